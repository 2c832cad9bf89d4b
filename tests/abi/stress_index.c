/* Stress of rkv_index_* for the race detector: six threads insert, remove, find and set words over the same chains, then check_integrity.
 * Build everything with -fsanitize=thread; any report, or a line with BROKEN, is a failure. */
#include "radixkv/radixkv.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CH 300
static uint64_t chains[CH][24]; static rkv_index *ix; 
static uint64_t mixx(uint64_t x){x^=x>>31;x*=0x9E3779B97F4A7C15ull;x^=x>>29;return x*0xBF58476D1CE4E5B9ull;}
static int steps=4000;
static void *go(void*a){ unsigned id=(unsigned)(size_t)a; uint64_t r=id*77+1;
 for(int i=0;i<steps;i++){ r=mixx(r+i); uint64_t *c=chains[r%CH]; int len=1+(r>>20)%24, first=(r>>30)%len; int k=(r>>40)%16;
  if(k<4) rkv_index_insert(ix,id,c,len,NULL,NULL);
  else if(k<7) rkv_index_insert(ix,id,c+first,len-first,first?c+first-1:NULL,NULL);
  else if(k<10) rkv_index_remove(ix,id,c+first,len-first,NULL);
  else if(k<11 && (r>>50)%64==0) {rkv_index_remove_worker(ix,id,NULL);}
  else if(k==11 && (r>>50)%256==0){ rkv_index_stats s; RKV_INIT(&s); rkv_index_get_stats(ix,&s); char m[100]; if(rkv_index_check_integrity(ix,m,100)) {printf("BROKEN %s\n",m);exit(1);} }
  else { uint32_t w[64],p[64],h[4096]; rkv_index_node n[64]; rkv_index_hit hit; RKV_INIT(&hit); hit.workers=w;hit.pages=p;hit.max_workers=64; if(k&1){hit.nodes=n;hit.max_nodes=64;hit.holders=h;hit.max_holders=4096;}
    if(rkv_index_find(ix,c,24,&hit)){printf("find fails\n");exit(1);}
    for(size_t j=0;j<hit.num_nodes;j++){ uint64_t v; if(rkv_index_get_word(ix,n[j].node,&v)==RKV_OK && (r>>55)==0) rkv_index_set_word(ix,n[j].node,v); } }
 } return NULL;}
int main(int argc,char**argv){ if(argc>1)steps=atoi(argv[1]);
 for(int bound=0;bound<2;bound++){ rkv_index_config cfg; RKV_INIT(&cfg); cfg.max_pages=bound?1500:0; rkv_index_create(&cfg,&ix);
 for(int i=0;i<CH;i++){uint64_t h=i/5+1;for(int j=0;j<24;j++){ if(j==(i%5)*4+2) h=mixx(h+i*1000003); h=mixx(h); chains[i][j]=h;}}
 pthread_t t[6]; for(size_t i=0;i<6;i++)pthread_create(&t[i],0,go,(void*)i); for(int i=0;i<6;i++)pthread_join(t[i],0);
 char m[100]; rkv_index_stats s; RKV_INIT(&s); rkv_index_get_stats(ix,&s);
 if(rkv_index_check_integrity(ix,m,100)) {printf("BROKEN %s\n",m);return 1;}
 printf("pages %lu entries %lu orphans %lu nodes %lu evicted %lu mem %lu\n",s.pages,s.entries,s.orphan_pages,s.nodes,s.evicted_pages,s.memory_bytes);
 rkv_index_destroy(ix);} return 0;}
