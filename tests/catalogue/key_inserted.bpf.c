#ifdef NEW
struct value { __u32 ip; __u32 netns; __u16 port; __u16 pad; };
#else
struct value { __u32 ip; __u16 port; __u16 pad; };
#endif
MAP(m, HASH, 8, struct value, __u32);
