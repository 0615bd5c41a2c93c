#ifdef NEW
#define NAMED(name) km_##name
#else
#define NAMED(name) name
#endif
MAP(NAMED(service), HASH, 8, __u32, __u64);
MAP(NAMED(endpoint), HASH, 8, __u32, __u64);
