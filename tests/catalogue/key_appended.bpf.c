#ifdef NEW
struct value { __u32 ip; __u32 prio; };
#else
struct value { __u32 ip; };
#endif
MAP(m, HASH, 8, struct value, __u32);
