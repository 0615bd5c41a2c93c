#ifdef NEW
struct value { struct { union { __u32 ip4; __u32 ip6[4]; }; } addr; __u32 port; };
#else
struct value { __u32 addr; __u32 port; };
#endif
MAP(m, HASH, 8, __u32, struct value);
