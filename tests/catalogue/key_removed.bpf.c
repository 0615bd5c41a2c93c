#ifdef NEW
struct value { __u32 ip; };
#else
struct value { __u32 ip; __u32 prio; };
#endif
struct count { __u32 hits; };
MAP(m, HASH, 8, struct value, struct count);
