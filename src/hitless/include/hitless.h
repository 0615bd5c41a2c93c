/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What an upgrade should know about a field or a map, written where it is declared:
 *
 *     struct counters {
 *         __u64 opened HITLESS_MERGE(sum);      both releases count while an upgrade runs: add it up
 *         __u32 refused HITLESS_WAS(denied);    called `denied` in the release before
 *         __u32 limit HITLESS_DEFAULT(100);     for entries that did not have it
 *     };
 *     struct { ... } service_counter SEC(".maps") HITLESS_WAS(counter);
 *     struct { ... } session SEC(".maps") HITLESS_GROUP(auth);    carried with the others of the group or not at all
 *     struct { ... } route SEC(".maps") HITLESS_PROGRAMS_READ;    no program writes it: copied with less memory
 *
 * It travels in the object's BTF. A compiler that cannot write such tags (clang before 14, gcc before 16) leaves them
 * out; bundle.toml can say the same.
 */
#ifndef HITLESS_H
#define HITLESS_H

#ifdef __has_attribute
#if __has_attribute(btf_decl_tag)
#define HITLESS_TAG(text) __attribute__((btf_decl_tag("hitless:" text)))
#endif
#endif
#ifndef HITLESS_TAG
#define HITLESS_TAG(text)
#endif

/* The name before this release. May be given more than once. */
#define HITLESS_WAS(name) HITLESS_TAG("was=" #name)

/* How writes of both releases come together: keep, sum, max, min or or. Anything else does not compile. */
#define HITLESS_MERGE(policy) HITLESS_MERGE_##policy
#define HITLESS_MERGE_keep HITLESS_TAG("merge=keep")
#define HITLESS_MERGE_sum HITLESS_TAG("merge=sum")
#define HITLESS_MERGE_max HITLESS_TAG("merge=max")
#define HITLESS_MERGE_min HITLESS_TAG("merge=min")
#define HITLESS_MERGE_or HITLESS_TAG("merge=or")

/* A number, or a macro that stands for one. */
#define HITLESS_DEFAULT(value) HITLESS_DEFAULT_(value)
#define HITLESS_DEFAULT_(value) HITLESS_TAG("default=" #value)

/* For maps whose entries refer to each other. */
#define HITLESS_GROUP(name) HITLESS_TAG("group=" #name)

/* A promise about a hash map, which the verifier is asked to prove when the release is applied. */
#define HITLESS_PROGRAMS_READ HITLESS_TAG("programs=read")

#endif
