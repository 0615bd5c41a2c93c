// SPDX-License-Identifier: Apache-2.0
// What the generated C needs: random values for old records, and the judgement of new ones.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TAG(text)
typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef unsigned long long __u64;
typedef signed char __s8; typedef short __s16; typedef int __s32; typedef long long __s64;
typedef unsigned __int128 __u128; typedef __int128 __s128;
typedef __u16 __be16; typedef __u32 __be32; typedef __u64 __be64;

static __u64 state;
static int pair, row, bad;
static long checked;
static __u8 flags[512];
static long counts[512];

static __u64 next(void)
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return state;
}

// Small, large and negative numbers alike.
static __u64 any(void)
{
    __u64 made = next() >> (next() % 64);
    return next() & 1 ? made : -made;
}

static __u128 anywide(void)
{
    __u128 made = ((__u128)next() << 64 | next()) >> (next() % 128);
    return next() & 1 ? made : -made;
}

static void noise(void *to, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((__u8 *)to)[i] = next() % 3 ? next() : 0;
}

static void text(char *to, size_t size)
{
    size_t length = next() % (size + 1);
    memset(to, 0, size);
    for (size_t i = 0; i < length; i++)
        to[i] = 'a' + next() % 26;
}

typedef struct { int negative; __u128 size; } number;

static number from_signed(__s128 x) { return x < 0 ? (number){1, -(__u128)x} : (number){0, x}; }
static number from_unsigned(__u128 x) { return (number){0, x}; }
#define V(x, is_signed) ((is_signed) ? from_signed((__s128)(x)) : from_unsigned((__u128)(x)))
#define NET(x) (sizeof(x) == 2 ? __builtin_bswap16(x) : sizeof(x) == 4 ? __builtin_bswap32(x) : __builtin_bswap64(x))

static int less(number a, number b)
{
    if (a.negative != b.negative)
        return a.negative;
    return a.negative ? a.size > b.size : a.size < b.size;
}

static int equal(number a, number b) { return a.negative == b.negative && a.size == b.size; }

static void judge(int right, int line)
{
    checked++;
    if (right)
        return;
    bad++;
    printf("bad %d %d %d\n", pair, row, line);
}

static void judge_number(int flag, number was, number now, int width, int is_signed, int boolean,
                         const long long *names, int count, int line)
{
    __u128 one = 1;
    number low = {0, 0}, high = {0, width == 128 ? -one : (one << width) - 1}, want = was;
    if (is_signed) {
        low = (number){1, one << (width - 1)};
        high.size = (one << (width - 1)) - 1;
    }
    if (boolean)
        high.size = 1;
    int off = 0, known = 0;
    if (less(was, low)) { want = low; off = 1; }
    if (less(high, was)) { want = high; off = 1; }
    for (int i = 0; i < count; i++)
        if (!known && equal(was, from_signed(names[2 * i]))) { want = from_signed(names[2 * i + 1]); known = 1; }
    if (count >= 0)
        off = !known;
    if (off)
        flags[flag] = 1;
    judge(equal(want, now), line);
}

static int zero(const void *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (((const __u8 *)at)[i])
            return 0;
    return 1;
}

static size_t most(int count, ...)
{
    va_list sizes;
    size_t out = 0;
    va_start(sizes, count);
    for (int i = 0; i < count; i++) {
        size_t size = va_arg(sizes, size_t);
        out = size > out ? size : out;
    }
    va_end(sizes);
    return out;
}

#define MOST most
#define NUMBER(...) judge_number(__VA_ARGS__, __LINE__)
#define EQUAL(right) judge(right, __LINE__)
#define SAME(a, b, size) judge(!memcmp(&(a), &(b), size), __LINE__)
#define ZERO(at, size) judge(zero(at, size), __LINE__)
#define LOST(flag, at, size) if (!zero(at, size)) flags[flag] = 1
#define BEYOND(flag, base, from, ...) \
    do { \
        size_t end = most(__VA_ARGS__), begin = (from); \
        if (begin < end && !zero((const __u8 *)(base) + begin, end - begin)) flags[flag] = 1; \
    } while (0)
#define o (*was)
#define n (*now)
