#ifdef NEW
struct value { char name[8]; };
#else
struct value { char name[4]; };
#endif
MAP(m, HASH, 8, __u32, struct value);
