struct small { __u32 size; __u8 bytes[64]; };
struct large { __u32 size; __u8 bytes[256]; };
#ifdef NEW
MAP(map_of_64, HASH, 8, __u32, struct small);
MAP(map_of_256, HASH, 8, __u32, struct large);
#else
MAP(all, HASH, 8, __u32, struct large);
#endif
