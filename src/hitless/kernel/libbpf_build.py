"""The part of libbpf and libc that hitless calls, as declarations for cffi's out-of-line ABI mode.

Running this module writes ``_libbpf.py`` beside it; no compiler is needed, on the node or at install.
Structures are the kernel's and libbpf 1.1's; every one that grows carries its own size, so newer libraries fit.
"""

from pathlib import Path

import cffi

ffi = cffi.FFI()
ffi.set_source("hitless.kernel._libbpf", None)
ffi.cdef(
    """
    typedef uint32_t __u32;
    typedef uint64_t __u64;

    /* libc */
    int renameat2(int olddirfd, const char *oldpath, int newdirfd, const char *newpath, unsigned int flags);
    long syscall(long number, ...);
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);
    int munmap(void *addr, size_t length);
    int setns(int fd, int nstype);
    struct cap_header { __u32 version; int pid; };
    struct cap_data { __u32 effective; __u32 permitted; __u32 inheritable; };
    int capget(struct cap_header *header, struct cap_data *data);
    int capset(struct cap_header *header, const struct cap_data *data);
    int prctl(int option, ...);
    int unshare(int flags);
    int vsnprintf(char *str, size_t size, const char *format, void *args);

    /* bpf.h */
    struct bpf_map_batch_opts { size_t sz; __u64 elem_flags; __u64 flags; };
    struct bpf_map_create_opts {
        size_t sz; __u32 btf_fd; __u32 btf_key_type_id; __u32 btf_value_type_id; __u32 btf_vmlinux_value_type_id;
        __u32 inner_map_fd; __u32 map_flags; __u64 map_extra; __u32 numa_node; __u32 map_ifindex;
    };
    struct bpf_link_update_opts { size_t sz; __u32 flags; __u32 old_prog_fd; };
    union bpf_iter_link_info {
        struct { __u32 map_fd; } map; struct { __u32 order; __u32 cgroup_fd; __u64 cgroup_id; } cgroup;
    };
    struct bpf_link_create_opts {
        size_t sz; __u32 flags; union bpf_iter_link_info *iter_info; __u32 iter_info_len; __u32 target_btf_id;
    };
    struct bpf_test_run_opts {
        size_t sz; const void *data_in; void *data_out; __u32 data_size_in; __u32 data_size_out;
        const void *ctx_in; void *ctx_out; __u32 ctx_size_in; __u32 ctx_size_out;
        __u32 retval; int repeat; __u32 duration; __u32 flags; __u32 cpu; __u32 batch_size;
    };
    struct bpf_prog_load_opts {
        size_t sz; int attempts; int expected_attach_type; __u32 prog_btf_fd; __u32 prog_flags; __u32 prog_ifindex;
        __u32 kern_version; __u32 attach_btf_id; __u32 attach_prog_fd; __u32 attach_btf_obj_fd; const int *fd_array;
        const void *func_info; __u32 func_info_cnt; __u32 func_info_rec_size;
        const void *line_info; __u32 line_info_cnt; __u32 line_info_rec_size;
        __u32 log_level; __u32 log_size; char *log_buf;
    };
    struct bpf_map_info {
        __u32 type; __u32 id; __u32 key_size; __u32 value_size; __u32 max_entries; __u32 map_flags; char name[16];
        __u32 ifindex; __u32 btf_vmlinux_value_type_id; __u64 netns_dev; __u64 netns_ino;
        __u32 btf_id; __u32 btf_key_type_id; __u32 btf_value_type_id; __u32 pad; __u64 map_extra;
    };
    struct bpf_prog_info {
        __u32 type; __u32 id; unsigned char tag[8]; __u32 jited_prog_len; __u32 xlated_prog_len;
        __u64 jited_prog_insns; __u64 xlated_prog_insns; __u64 load_time; __u32 created_by_uid;
        __u32 nr_map_ids; __u64 map_ids; char name[16];
        __u32 ifindex; __u32 gpl_compatible; __u64 netns_dev; __u64 netns_ino;
        __u32 nr_jited_ksyms; __u32 nr_jited_func_lens; __u64 jited_ksyms; __u64 jited_func_lens;
        __u32 btf_id; __u32 func_info_rec_size; __u64 func_info; __u32 nr_func_info; __u32 nr_line_info;
    };
    struct bpf_btf_info { __u64 btf; __u32 btf_size; __u32 id; __u64 name; __u32 name_len; __u32 kernel_btf; };
    struct bpf_link_info {
        __u32 type; __u32 id; __u32 prog_id; __u32 pad;
        union {
            struct { __u64 cgroup_id; __u32 attach_type; } cgroup;
            struct { __u32 netns_ino; __u32 attach_type; } netns;
            struct { __u32 ifindex; } xdp;
            struct { __u32 ifindex; __u32 attach_type; } tcx;
            struct { __u32 map_id; __u32 attach_type; } sockmap;
            struct { __u32 map_id; } struct_ops;
            struct { __u32 pf; __u32 hooknum; int priority; __u32 flags; } netfilter;
            struct { __u64 name; __u32 name_len; } raw_tracepoint;
            struct { __u64 name; __u32 name_len; __u32 map_id; __u64 cgroup_id; __u32 order; } iter;
            struct { __u32 type; __u32 pad; __u64 name; __u32 name_len; __u32 offset; } perf_event;
            struct { __u32 kind; __u32 pad; __u64 config; __u32 type; } sampled;
            unsigned char other[64];
        };
    };
    struct netfilter_link_create {
        __u32 prog_fd; __u32 target_fd; __u32 attach_type; __u32 link_flags; __u32 pf; __u32 hooknum; int priority;
        __u32 flags;
    };
    int bpf_map_create(int type, const char *name, __u32 key_size, __u32 value_size, __u32 max_entries,
                       const struct bpf_map_create_opts *opts);
    int bpf_prog_load(int type, const char *name, const char *license, const void *insns, size_t insn_cnt,
                      const struct bpf_prog_load_opts *opts);
    int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags);
    int bpf_map_lookup_elem_flags(int fd, const void *key, void *value, __u64 flags);
    int bpf_map_delete_elem(int fd, const void *key);
    int bpf_map_lookup_and_delete_elem(int fd, const void *key, void *value);
    int bpf_map_get_next_key(int fd, const void *key, void *next_key);
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, __u32 *count,
                             const struct bpf_map_batch_opts *opts);
    int bpf_map_update_batch(int fd, const void *keys, const void *values, __u32 *count,
                             const struct bpf_map_batch_opts *opts);
    int bpf_map_delete_batch(int fd, const void *keys, __u32 *count, const struct bpf_map_batch_opts *opts);
    int bpf_map_get_fd_by_id(__u32 id);
    int bpf_btf_load(const void *btf_data, size_t btf_size, const void *opts);
    int bpf_obj_pin(int fd, const char *pathname);
    int bpf_obj_get(const char *pathname);
    int bpf_obj_get_info_by_fd(int fd, void *info, __u32 *info_len);
    int bpf_prog_get_fd_by_id(__u32 id);
    int bpf_prog_get_next_id(__u32 start_id, __u32 *next_id);
    int bpf_btf_get_fd_by_id(__u32 id);
    int bpf_link_get_fd_by_id(__u32 id);
    int bpf_link_get_next_id(__u32 start_id, __u32 *next_id);
    int bpf_link_create(int prog_fd, int target_fd, int attach_type, const void *opts);
    int bpf_raw_tracepoint_open(const char *name, int prog_fd);
    int bpf_iter_create(int link_fd);
    int bpf_link_update(int link_fd, int new_prog_fd, const struct bpf_link_update_opts *opts);
    int bpf_link_detach(int link_fd);
    struct bpf_prog_attach_opts { size_t sz; unsigned int flags; int replace_prog_fd; };
    int bpf_prog_attach_opts(int prog_fd, int target, int type, const struct bpf_prog_attach_opts *opts);
    int bpf_prog_detach2(int prog_fd, int attachable_fd, int type);
    int bpf_prog_query(int target_fd, int type, __u32 query_flags, __u32 *attach_flags, __u32 *prog_ids,
                       __u32 *prog_cnt);
    int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *opts);

    /* perf_event.h */
    struct perf_event_attr {
        __u32 type; __u32 size; __u64 config; __u64 sample_period; __u64 sample_type; __u64 read_format; __u64 flags;
        __u32 wakeup_events; __u32 bp_type; __u64 config1; __u64 config2;
    };

    /* libbpf.h */
    typedef int (*libbpf_print_fn_t)(int level, const char *format, void *args);
    libbpf_print_fn_t libbpf_set_print(libbpf_print_fn_t fn);
    int libbpf_find_vmlinux_btf_id(const char *name, int attach_type);
    int libbpf_num_possible_cpus(void);
    __u32 libbpf_major_version(void);
    __u32 libbpf_minor_version(void);
    const char *libbpf_bpf_map_type_str(int type);
    const char *libbpf_bpf_prog_type_str(int type);
    const char *libbpf_bpf_attach_type_str(int type);
    const char *libbpf_bpf_link_type_str(int type);
    struct bpf_xdp_attach_opts { size_t sz; int old_prog_fd; };
    int bpf_xdp_attach(int ifindex, int prog_fd, __u32 flags, const struct bpf_xdp_attach_opts *opts);
    struct bpf_tc_hook { size_t sz; int ifindex; int attach_point; __u32 parent; };
    struct bpf_tc_opts { size_t sz; int prog_fd; __u32 flags; __u32 prog_id; __u32 handle; __u32 priority; };
    int bpf_tc_hook_create(struct bpf_tc_hook *hook);
    int bpf_tc_attach(const struct bpf_tc_hook *hook, struct bpf_tc_opts *opts);
    int bpf_tc_detach(const struct bpf_tc_hook *hook, const struct bpf_tc_opts *opts);
    struct bpf_object;
    struct bpf_map;
    struct bpf_program;
    struct bpf_object_open_opts { size_t sz; const char *object_name; };
    struct bpf_object *bpf_object__open_mem(const void *buf, size_t size, const struct bpf_object_open_opts *opts);
    int bpf_object__load(struct bpf_object *obj);
    void bpf_object__close(struct bpf_object *obj);
    struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
    struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
    const char *bpf_map__name(const struct bpf_map *map);
    int bpf_map__fd(const struct bpf_map *map);
    bool bpf_map__is_internal(const struct bpf_map *map);
    __u32 bpf_map__value_size(const struct bpf_map *map);
    int bpf_map__reuse_fd(struct bpf_map *map, int fd);
    int bpf_map__type(const struct bpf_map *map);
    int bpf_map__set_map_flags(struct bpf_map *map, __u32 flags);
    __u32 bpf_map__map_flags(const struct bpf_map *map);
    __u32 bpf_map__max_entries(const struct bpf_map *map);
    __u32 bpf_map__numa_node(const struct bpf_map *map);
    __u64 bpf_map__map_extra(const struct bpf_map *map);
    void *bpf_map__initial_value(const struct bpf_map *map, size_t *psize);
    struct bpf_link;
    struct bpf_link *bpf_map__attach_struct_ops(const struct bpf_map *map);
    void bpf_link__disconnect(struct bpf_link *link);
    int bpf_link__destroy(struct bpf_link *link);
    int bpf_map__set_pin_path(struct bpf_map *map, const char *path);
    const char *bpf_program__name(const struct bpf_program *prog);
    int bpf_program__fd(const struct bpf_program *prog);
    const char *bpf_program__section_name(const struct bpf_program *prog);
    int bpf_program__type(const struct bpf_program *prog);
    int bpf_program__set_type(struct bpf_program *prog, int type);
    int bpf_program__set_expected_attach_type(struct bpf_program *prog, int type);
    int bpf_program__expected_attach_type(const struct bpf_program *prog);
    int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
    """
)

if __name__ == "__main__":
    ffi.compile(tmpdir=str(Path(__file__).resolve().parents[2]))
