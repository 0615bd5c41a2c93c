#ifdef NEW
struct value { __u16 a[2]; };
#else
struct value { __u16 a[4]; };
#endif
MAP(m, HASH, 8, __u32, struct value);
