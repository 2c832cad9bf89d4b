// A Go host that links the plugin through cgo. Build and run:
//
//	PKG_CONFIG_PATH=$LIB/pkgconfig go build host.go && LD_LIBRARY_PATH=$LIB ./host
//
// with LIB the folder of radixkv.get_library_path(). cgo forbids C structs that point into Go memory, so the small C functions
// below build the structs on the C side; the library copies its inputs and keeps none of them.
package main

/*
#cgo pkg-config: radixkv
#include <radixkv/radixkv.h>

static rkv_status create(int32_t page_size, rkv_tree **out)
{
    rkv_tree_config config;
    RKV_INIT(&config);
    config.page_size = page_size;
    return rkv_tree_create(&config, out);
}

static rkv_key make_key(const int32_t *tokens, size_t num_tokens)
{
    rkv_key key;
    RKV_INIT(&key);
    key.tokens = tokens;
    key.num_tokens = num_tokens;
    return key;
}

static rkv_status insert(rkv_tree *tree, const int32_t *tokens, size_t num_tokens, const int32_t *page_ids, size_t num_pages,
                         int32_t *duplicates, rkv_insert *out)
{
    rkv_key key = make_key(tokens, num_tokens);
    RKV_INIT(out);
    return rkv_tree_insert(tree, &key, page_ids, num_pages, NULL, 0, duplicates, out);
}

static rkv_status match(rkv_tree *tree, const int32_t *tokens, size_t num_tokens, int32_t *page_ids, rkv_match *out)
{
    rkv_key key = make_key(tokens, num_tokens);
    RKV_INIT(out);
    return rkv_tree_match(tree, &key, page_ids, out);
}

// Evict, and copy out up to max_pages of the freed ids.
static rkv_status evict(rkv_tree *tree, int64_t num_tokens, int32_t *page_ids, size_t max_pages, size_t *num_pages)
{
    rkv_freed freed;
    rkv_status status;
    size_t i;
    RKV_INIT(&freed);
    status = rkv_tree_evict(tree, num_tokens, 0, &freed);
    *num_pages = freed.num_pages;
    for (i = 0; i < max_pages && i < freed.num_pages; i++) {
        page_ids[i] = freed.page_ids[i];
    }
    rkv_freed_release(&freed);
    return status;
}

// Who holds the prompt: up to max_workers ids and the leading pages that each holds.
static rkv_status find(rkv_index *index, const uint64_t *page_keys, size_t num_pages, uint32_t *workers, uint32_t *pages,
                       size_t max_workers, size_t *num_workers)
{
    rkv_index_hit hit;
    rkv_status status;
    RKV_INIT(&hit);
    hit.workers = workers;
    hit.pages = pages;
    hit.max_workers = max_workers;
    status = rkv_index_find(index, page_keys, num_pages, &hit);
    *num_workers = hit.num_workers;
    return status;
}
*/
import "C"

import (
	"fmt"
	"os"
	"reflect"
	"runtime"
)

const page = 4

// Tree owns a C tree; Close destroys it.
type Tree struct{ raw *C.rkv_tree }

// Error is a failed call, in the library's words.
type Error struct {
	Status  C.rkv_status
	Message string
}

func (e *Error) Error() string { return C.GoString(C.rkv_status_string(e.Status)) + ": " + e.Message }

// call runs f and reads its error on the same thread: rkv_last_error is per thread, and goroutines move between threads.
func call(f func() C.rkv_status) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if status := f(); status != C.RKV_OK {
		return &Error{status, C.GoString(C.rkv_last_error())}
	}
	return nil
}

func ids(list []int32) *C.int32_t {
	if len(list) == 0 {
		return nil
	}
	return (*C.int32_t)(&list[0])
}

func newTree(pageSize int32) (*Tree, error) {
	tree := &Tree{}
	err := call(func() C.rkv_status { return C.create(C.int32_t(pageSize), &tree.raw) })
	return tree, err
}

// Close destroys the tree.
func (t *Tree) Close() { C.rkv_tree_destroy(t.raw) }

// Insert returns the tokens that were cached before and the ids that stay the caller's.
func (t *Tree) Insert(tokens, pageIDs []int32) (prefixTokens int, duplicates []int32, err error) {
	var out C.rkv_insert
	duplicates = make([]int32, len(pageIDs))
	err = call(func() C.rkv_status {
		return C.insert(t.raw, ids(tokens), C.size_t(len(tokens)), ids(pageIDs), C.size_t(len(pageIDs)), ids(duplicates), &out)
	})
	return int(out.prefix_tokens), duplicates[:out.num_duplicates], err
}

// Match returns the node where the hit ends and its page ids.
func (t *Tree) Match(tokens []int32) (node C.rkv_node, pageIDs []int32, err error) {
	var out C.rkv_match
	pageIDs = make([]int32, len(tokens)/page)
	err = call(func() C.rkv_status {
		return C.match(t.raw, ids(tokens), C.size_t(len(tokens)), ids(pageIDs), &out)
	})
	return out.device_node, pageIDs[:(out.num_tokens+out.host_num_tokens)/page], err
}

// Lock protects the path to a node from eviction.
func (t *Tree) Lock(node C.rkv_node) error {
	return call(func() C.rkv_status { return C.rkv_tree_lock(t.raw, node, nil) })
}

// Unlock undoes one Lock.
func (t *Tree) Unlock(node C.rkv_node) error {
	return call(func() C.rkv_status { return C.rkv_tree_unlock(t.raw, node, nil) })
}

// Evict frees up to numTokens tokens and returns their page ids.
func (t *Tree) Evict(numTokens int64) ([]int32, error) {
	var numPages C.size_t
	pageIDs := make([]int32, 64)
	err := call(func() C.rkv_status {
		return C.evict(t.raw, C.int64_t(numTokens), ids(pageIDs), C.size_t(len(pageIDs)), &numPages)
	})
	return pageIDs[:numPages], err
}

// CheckIntegrity verifies every invariant.
func (t *Tree) CheckIntegrity() error {
	return call(func() C.rkv_status { return C.rkv_tree_check_integrity(t.raw, nil, nil, nil, 0) })
}

// Index owns a C index; Close destroys it.
type Index struct{ raw *C.rkv_index }

func newIndex() (*Index, error) {
	index := &Index{}
	err := call(func() C.rkv_status { return C.rkv_index_create(nil, &index.raw) })
	return index, err
}

// Close destroys the index.
func (x *Index) Close() { C.rkv_index_destroy(x.raw) }

// Insert says that a worker holds these pages of a prompt.
func (x *Index) Insert(worker uint32, pageKeys []uint64) error {
	return call(func() C.rkv_status {
		return C.rkv_index_insert(x.raw, C.uint32_t(worker), (*C.uint64_t)(&pageKeys[0]), C.size_t(len(pageKeys)), nil, nil)
	})
}

// Find returns worker -> leading pages of the prompt that it holds, for at most 64 workers.
func (x *Index) Find(pageKeys []uint64) (map[uint32]uint32, error) {
	var workers, pages [64]C.uint32_t
	var numWorkers C.size_t
	err := call(func() C.rkv_status {
		return C.find(x.raw, (*C.uint64_t)(&pageKeys[0]), C.size_t(len(pageKeys)), &workers[0], &pages[0], 64, &numWorkers)
	})
	found := map[uint32]uint32{}
	for i := 0; i < int(numWorkers); i++ {
		found[uint32(workers[i])] = uint32(pages[i])
	}
	return found, err
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "host.go:", err)
		os.Exit(1)
	}
}

func expect(got, want any, what string) {
	if !reflect.DeepEqual(got, want) {
		must(fmt.Errorf("%s: got %v, want %v", what, got, want))
	}
}

func main() {
	first, second := make([]int32, 16), make([]int32, 16)
	for i := range first {
		first[i], second[i] = int32(i), int32(i)
		if i >= 8 {
			second[i] += 100
		}
	}
	tree, err := newTree(page)
	must(err)
	defer tree.Close()

	_, duplicates, err := tree.Insert(first, []int32{0, 1, 2, 3})
	must(err)
	expect(len(duplicates), 0, "the first prompt is new")
	shared, duplicates, err := tree.Insert(second, []int32{10, 11, 12, 13})
	must(err)
	expect(duplicates, []int32{10, 11}, "pages that stay with the engine")

	node, pageIDs, err := tree.Match(second)
	must(err)
	expect(pageIDs, []int32{0, 1, 12, 13}, "the second prompt is cached")

	must(tree.Lock(node))
	underLock, err := tree.Evict(1000)
	must(err)
	expect(underLock, []int32{2, 3}, "only the first prompt's own tail may go")
	must(tree.Unlock(node))
	refused, isError := tree.Unlock(node).(*Error)
	expect(isError && refused.Status == C.RKV_ERR_LOCK && refused.Message != "", true, "one unlock too many is an error")
	must(tree.CheckIntegrity())
	rest, err := tree.Evict(1000)
	must(err)
	expect(len(rest), 4, "evict the rest")

	index, err := newIndex()
	must(err)
	defer index.Close()
	must(index.Insert(7, []uint64{11, 22}))
	must(index.Insert(9, []uint64{11}))
	found, err := index.Find([]uint64{11, 22, 33})
	must(err)
	expect(found, map[uint32]uint32{7: 2, 9: 1}, "who holds the prompt")
	fmt.Printf("radixkv %s from Go: %d tokens shared, %d duplicates, %d evicted under a lock, unlock twice: %s, index: %d pages\n",
		C.GoString(C.rkv_version()), shared, len(duplicates), len(underLock)*page,
		C.GoString(C.rkv_status_string(refused.Status)), found[7])
}
