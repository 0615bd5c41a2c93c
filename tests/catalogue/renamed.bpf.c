#ifdef NEW
struct value { __u32 a; __u32 hits TAG("was=count"); };
#else
struct value { __u32 a; __u32 count; };
#endif
MAP(m, HASH, 8, __u32, struct value);
