#ifdef NEW
struct value { __u32 id; };
#else
struct value { __s32 id; };
#endif
MAP(m, HASH, 8, struct value, __u32);
