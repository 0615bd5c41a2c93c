#ifdef NEW
struct value { __u8 a; __u8 flag; __u32 b; };
#else
struct value { __u8 a; __u32 b; };
#endif
MAP(m, HASH, 8, __u32, struct value);
