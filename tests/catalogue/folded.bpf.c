#ifdef NEW
MAP(both, HASH, 16, __u32, __u64);
#else
MAP(first, HASH, 8, __u32, __u64);
MAP(second, HASH, 8, __u32, __u64);
#endif
