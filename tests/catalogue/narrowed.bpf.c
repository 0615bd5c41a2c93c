#ifdef NEW
struct value { __u16 a; };
#else
struct value { __u32 a; };
#endif
MAP(m, HASH, 8, __u32, struct value);
