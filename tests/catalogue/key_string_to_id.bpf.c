#ifdef NEW
struct value { __u32 name; };
#else
struct value { char name[8]; };
#endif
MAP(m, HASH, 8, struct value, __u32);
