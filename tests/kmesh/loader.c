/* A daemon's own loader, by libbpf alone: it knows nothing of hitless.
 *
 *     loader OBJECTS ROOT CGROUP VERSION [NETNS...]
 *
 * loads all *.bpf.o of the directory OBJECTS, pins their maps by name in ROOT/map and links where they belong below
 * ROOT, and attaches XDP and tc to eth0 of each NETNS. What was there before decides how it starts:
 *
 *     Normal   ROOT/map/kmesh_version is not there or 0: everything is made
 *     Restart  it is the hash of VERSION: pinned maps are used again, pinned links updated in place
 *     Update   anything else: it can carry nothing to another release, says so and ends with 3
 *
 * It prints a line of JSON, and at SIGTERM ends and leaves all as it is. Whatever fails is said on stderr: it ends with 1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/if_link.h>

#define MOST 32
#define MAPS 128
#define COUNT_OF(array) (sizeof(array) / sizeof(*(array)))

/* What programs are whose section libbpf does not know. */
static const struct { const char *name; enum bpf_prog_type type; enum bpf_attach_type attach; } meant[] = {
    {"cgroup_connect4_policy", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT},
    {"xdp_auth_prog", BPF_PROG_TYPE_XDP, BPF_XDP},
    {"xdp_auth_check", BPF_PROG_TYPE_XDP, BPF_XDP},
    {"tc_workload_prog", BPF_PROG_TYPE_SCHED_CLS, 0},
    {"tc_mark_encrypt_prog", BPF_PROG_TYPE_SCHED_CLS, 0},
    {"tc_mark_decrypt_prog", BPF_PROG_TYPE_SCHED_CLS, 0},
};
static const char *const left_out[] = {"cgroup_connect6_policy"};
static const struct { const char *program, *pin; } links[] = {
    {"cgroup_connect4_prog", "sockconn/sockconn_prog"},
    {"cgroup_connect6_prog", "sockconn/sockconn6_prog"},
    {"cgroup_sendmsg4_prog", "sockconn/sockconn_dns_prog"},
    {"cgroup_recvmsg4_prog", "sockconn/sockconn_dns_recv_prog"},
    {"cgroup_getpeername4_prog", "sockconn/sockconn_peername_prog"},
    {"sockops_prog", "cgroup_sockops_prog"},
    {"cgroup_skb_ingress_prog", "cgroup_skb_ingress_prog"},
    {"cgroup_skb_egress_prog", "cgroup_skb_egress_prog"},
};
static const struct { const char *map; __u32 slot; const char *program; } slots[] = {
    {"km_cgr_tailcall", 0, "cgroup_connect4_policy"},
    {"km_xdp_tailcall", 0, "xdp_auth_check"},
};
static const struct { const char *program; enum bpf_tc_attach_point point; int priority; } filters[] = {
    {"tc_workload_prog", BPF_TC_INGRESS, 1},
    {"tc_mark_decrypt_prog", BPF_TC_INGRESS, 2},
    {"tc_mark_encrypt_prog", BPF_TC_EGRESS, 1},
};

static struct bpf_object *objects[MOST];
static int count_of_objects;
static struct { char name[64]; __u32 id; int reused; } maps[MAPS];
static int count_of_maps;
static const char *root;
static char said[1 << 16];

static void die(const char *format, ...)
{
    va_list words;
    va_start(words, format);
    vfprintf(stderr, format, words);
    va_end(words);
    fputc('\n', stderr);
    exit(1);
}

static int keep_words(enum libbpf_print_level level, const char *format, va_list words)
{
    size_t length = strlen(said);
    return level <= LIBBPF_WARN ? vsnprintf(said + length, sizeof(said) - length, format, words) : 0;
}

static char *below(char *path, const char *format, const char *name)
{
    int length = snprintf(path, PATH_MAX, "%s/", root);
    snprintf(path + length, PATH_MAX - length, format, name);
    return path;
}

static __u32 hash_of(const char *text)
{
    __u32 hash = 2166136261u;
    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 16777619u;
    return hash;
}

static int is_one(const struct dirent *entry)
{
    size_t length = strlen(entry->d_name);
    return length > 6 && !strcmp(entry->d_name + length - 6, ".bpf.o");
}

static void open_objects(const char *directory)
{
    struct dirent **found;
    int count = scandir(directory, &found, is_one, alphasort);
    if (count <= 0 || count > MOST)
        die("%s: %d objects", directory, count);
    for (int i = 0; i < count; i++) {
        char path[PATH_MAX];
        snprintf(path, sizeof(path), "%s/%s", directory, found[i]->d_name);
        struct bpf_object *object = bpf_object__open_file(path, NULL);
        if (!object)
            die("%s cannot be opened: %s\n%s", path, strerror(errno), said);
        objects[count_of_objects++] = object;
        struct bpf_program *program;
        bpf_object__for_each_program(program, object) {
            for (size_t n = 0; n < COUNT_OF(meant); n++)
                if (!strcmp(bpf_program__name(program), meant[n].name)) {
                    bpf_program__set_type(program, meant[n].type);
                    bpf_program__set_expected_attach_type(program, meant[n].attach);
                }
            for (size_t n = 0; n < COUNT_OF(left_out); n++)
                if (!strcmp(bpf_program__name(program), left_out[n]))
                    bpf_program__set_autoload(program, false);
        }
        free(found[i]);
    }
    free(found);
}

static struct bpf_program *program_called(const char *name)
{
    for (int i = 0; i < count_of_objects; i++) {
        struct bpf_program *program = bpf_object__find_program_by_name(objects[i], name);
        if (program)
            return program;
    }
    return NULL;
}

static struct bpf_map *map_called(const char *name)
{
    for (int i = 0; i < count_of_objects; i++) {
        struct bpf_map *map = bpf_object__find_map_by_name(objects[i], name);
        if (map)
            return map;
    }
    die("no object has a map %s", name);
    return NULL;
}

/* Whether a map is pinned there already. One of another definition is not ours to use: that ends the start. */
static int is_pinned(struct bpf_map *map, const char *path)
{
    struct bpf_map_info info = {};
    __u32 length = sizeof(info);
    int fd = bpf_obj_get(path);
    if (fd < 0 && errno == ENOENT)
        return 0;
    if (fd < 0 || bpf_obj_get_info_by_fd(fd, &info, &length))
        die("map %s: %s cannot be opened: %s", bpf_map__name(map), path, strerror(errno));
    close(fd);
    __u32 there[] = {info.type, info.key_size, info.value_size, info.max_entries, info.map_flags};
    __u32 ours[] = {bpf_map__type(map), bpf_map__key_size(map), bpf_map__value_size(map), bpf_map__max_entries(map),
                    bpf_map__map_flags(map)};
    static const char *const words[] = {"type", "key size", "value size", "max entries", "flags"};
    for (size_t i = 0; i < COUNT_OF(ours); i++)
        if (there[i] != ours[i])
            die("map %s: %s is another one: %s %u, not %u", bpf_map__name(map), path, words[i], there[i], ours[i]);
    return 1;
}

static void place_maps(void)
{
    for (int i = 0; i < count_of_objects; i++) {
        struct bpf_map *map;
        bpf_object__for_each_map(map, objects[i]) {
            char path[PATH_MAX];
            int reused = 0, known = 0;
            if (!bpf_map__is_internal(map)) {
                reused = is_pinned(map, below(path, "map/%s", bpf_map__name(map)));
                bpf_map__set_pin_path(map, path);
            }
            for (int n = 0; n < count_of_maps; n++)
                known |= !strcmp(maps[n].name, bpf_map__name(map));
            if (known)
                continue;
            if (count_of_maps == MAPS)
                die("too many maps");
            snprintf(maps[count_of_maps].name, sizeof(maps[0].name), "%s", bpf_map__name(map));
            maps[count_of_maps++].reused = reused;
        }
    }
}

static void load(void)
{
    char path[PATH_MAX];
    static const char *const directories[] = {"", "map", "sockconn"};
    for (size_t i = 0; i < COUNT_OF(directories); i++)
        if (mkdir(below(path, "%s", directories[i]), 0700) && errno != EEXIST)
            die("%s cannot be made: %s", path, strerror(errno));
    for (int i = 0; i < count_of_objects; i++)
        if (bpf_object__load(objects[i]))
            die("%s cannot be loaded: %s\n%s", bpf_object__name(objects[i]), strerror(errno), said);
    for (int n = 0; n < count_of_maps; n++) {
        struct bpf_map_info info = {};
        __u32 length = sizeof(info);
        if (bpf_obj_get_info_by_fd(bpf_map__fd(map_called(maps[n].name)), &info, &length))
            die("map %s: %s", maps[n].name, strerror(errno));
        maps[n].id = info.id;
    }
    for (size_t i = 0; i < COUNT_OF(slots); i++) {
        int fd = bpf_program__fd(program_called(slots[i].program));
        if (bpf_map_update_elem(bpf_map__fd(map_called(slots[i].map)), &slots[i].slot, &fd, BPF_ANY))
            die("%s cannot be put into %s: %s", slots[i].program, slots[i].map, strerror(errno));
    }
}

static void attach_cgroup(int cgroup)
{
    for (size_t i = 0; i < COUNT_OF(links); i++) {
        char path[PATH_MAX];
        struct bpf_program *program = program_called(links[i].program);
        if (!program)
            continue;
        struct bpf_link *link = bpf_link__open(below(path, "%s", links[i].pin));
        if (link) {
            if (bpf_link__update_program(link, program))
                die("link %s cannot be updated: %s", path, strerror(errno));
        } else if (errno != ENOENT) {
            die("link %s cannot be opened: %s", path, strerror(errno));
        } else {
            link = bpf_program__attach_cgroup(program, cgroup);
            if (!link || bpf_link__pin(link, path))
                die("%s cannot be attached and pinned at %s: %s\n%s", links[i].program, path, strerror(errno), said);
        }
        bpf_link__disconnect(link);
        bpf_link__destroy(link);
    }
}

static void attach_sockets(void)
{
    int map = bpf_map__fd(map_called("km_sockhash"));
    if (bpf_prog_attach(bpf_program__fd(program_called("sendmsg_prog")), map, BPF_SK_MSG_VERDICT, 0))
        die("sendmsg_prog cannot be attached to km_sockhash: %s", strerror(errno));
}

static void attach_pod(const char *netns)
{
    int fd = open(netns, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET))
        die("%s cannot be entered: %s", netns, strerror(errno));
    close(fd);
    int device = if_nametoindex("eth0");
    if (!device)
        die("%s has no eth0", netns);
    if (bpf_xdp_attach(device, bpf_program__fd(program_called("xdp_auth_prog")), XDP_FLAGS_SKB_MODE, NULL))
        die("%s: XDP cannot be attached: %s", netns, strerror(errno));
    DECLARE_LIBBPF_OPTS(bpf_tc_hook, both, .ifindex = device, .attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS);
    int result = bpf_tc_hook_create(&both);
    if (result && result != -EEXIST)
        die("%s: clsact cannot be made: %s", netns, strerror(-result));
    for (size_t i = 0; i < COUNT_OF(filters); i++) {
        DECLARE_LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = device, .attach_point = filters[i].point);
        DECLARE_LIBBPF_OPTS(bpf_tc_opts, opts, .handle = 1, .priority = filters[i].priority,
                            .prog_fd = bpf_program__fd(program_called(filters[i].program)), .flags = BPF_TC_F_REPLACE);
        result = bpf_tc_attach(&hook, &opts);
        if (result)
            die("%s: %s cannot be attached: %s", netns, filters[i].program, strerror(-result));
    }
}

static void print_start(const char *start)
{
    printf("{\"start\": \"%s\", \"maps\": {", start);
    for (int n = 0; n < count_of_maps; n++)
        printf("%s\"%s\": {\"id\": %u, \"reused\": %s}", n ? ", " : "", maps[n].name, maps[n].id,
               maps[n].reused ? "true" : "false");
    printf("}}\n");
    fflush(stdout);
}

int main(int count, char **words)
{
    if (count < 5)
        die("usage: loader OBJECTS ROOT CGROUP VERSION [NETNS...]");
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    libbpf_set_print(keep_words);
    root = words[2];
    int cgroup = open(words[3], O_RDONLY | O_CLOEXEC);
    if (cgroup < 0)
        die("%s: %s", words[3], strerror(errno));
    char path[PATH_MAX];
    __u32 zero = 0, there = 0, ours = hash_of(words[4]);
    int version = bpf_obj_get(below(path, "map/%s", "kmesh_version"));
    if (version < 0 && errno != ENOENT)
        die("%s cannot be opened: %s", path, strerror(errno));
    if (version >= 0 && bpf_map_lookup_elem(version, &zero, &there))
        die("%s cannot be read: %s", path, strerror(errno));
    if (there && there != ours) {
        print_start("Update");
        return 3;
    }
    open_objects(words[1]);
    place_maps();
    load();
    attach_cgroup(cgroup);
    attach_sockets();
    for (int i = 5; i < count; i++)
        attach_pod(words[i]);
    if (bpf_map_update_elem(bpf_map__fd(map_called("kmesh_version")), &zero, &ours, BPF_ANY))
        die("the version cannot be written: %s", strerror(errno));
    print_start(there ? "Restart" : "Normal");
    int number;
    sigwait(&term, &number);
    return 0;
}
