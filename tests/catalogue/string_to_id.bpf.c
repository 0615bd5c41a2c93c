#ifdef NEW
struct value { __u32 name; __u64 hits; };
#else
struct value { char name[8]; __u32 hits; };
#endif
MAP(m, HASH, 8, __u32, struct value);
