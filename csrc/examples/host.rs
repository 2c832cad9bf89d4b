//! A Rust host with nothing but std, linking the plugin. Build and run:
//!
//!   rustc --edition 2021 host.rs -C link-arg=$LIB/libradixkv.so.1 -C link-arg=-Wl,-rpath,$LIB && ./host
//!
//! with LIB the folder of radixkv.get_library_path(). Only what is used is declared here; bindgen over radixkv.h gives the rest.
use std::ffi::CStr;
use std::mem::size_of;
use std::os::raw::{c_char, c_void};
use std::ptr::{null, null_mut};

const RKV_OK: i32 = 0;
const RKV_ERR_LOCK: i32 = -3;
const PAGE: usize = 4;

#[repr(C)]
struct RawTree {
    _private: [u8; 0],
}

#[repr(C)]
struct Config {
    struct_size: u32,
    page_size: i32,
    policy: i32,
    flags: u32,
    max_events: u64,
    page_hash: *const c_void,
    page_hash_ctx: *mut c_void,
    digest_bytes: u32,
    reserved: u32,
    reallocate: *const c_void,
    allocator_ctx: *mut c_void,
}

#[repr(C)]
struct Key {
    struct_size: u32,
    reserved: u32,
    ns: *const c_void,
    ns_bytes: usize,
    tokens: *const i32,
    num_tokens: usize,
}

#[repr(C)]
#[derive(Default)]
struct Match {
    struct_size: u32,
    reserved: u32,
    tree_id: u64,
    namespace_id: u64,
    num_tokens: i64,
    host_num_tokens: i64,
    device_node: u64,
    host_node: u64,
}

#[repr(C)]
#[derive(Default)]
struct Insert {
    struct_size: u32,
    reserved: u32,
    prefix_tokens: i64,
    node: u64,
    num_duplicates: u64,
}

#[repr(C)]
struct Freed {
    struct_size: u32,
    reserved: u32,
    num_tokens: i64,
    page_ids: *mut i32,
    num_pages: u64,
    host_page_ids: *mut i32,
    num_host_pages: u64,
    backups: *mut c_void,
    num_backups: u64,
    backup_page_ids: *mut i32,
    num_backup_pages: u64,
    capacity: [u64; 4],
    reallocate: *const c_void,
    allocator_ctx: *mut c_void,
}

#[repr(C)]
struct RawIndex {
    _private: [u8; 0],
}

#[repr(C)]
struct IndexHit {
    struct_size: u32,
    reserved: u32,
    workers: *mut u32,
    pages: *mut u32,
    max_workers: usize,
    num_workers: usize,
    nodes: *mut c_void,
    max_nodes: usize,
    num_nodes: usize,
    holders: *mut u32,
    max_holders: usize,
    num_holders: usize,
}

extern "C" {
    fn rkv_index_create(config: *const c_void, out: *mut *mut RawIndex) -> i32;
    fn rkv_index_destroy(index: *mut RawIndex);
    fn rkv_index_insert(
        index: *mut RawIndex,
        worker: u32,
        page_keys: *const u64,
        num_pages: usize,
        parent_key: *const u64,
        num_added: *mut u64,
    ) -> i32;
    fn rkv_index_find(index: *mut RawIndex, page_keys: *const u64, num_pages: usize, hit: *mut IndexHit) -> i32;
    fn rkv_version() -> *const c_char;
    fn rkv_last_error() -> *const c_char;
    fn rkv_status_string(status: i32) -> *const c_char;
    fn rkv_tree_create(config: *const Config, out: *mut *mut RawTree) -> i32;
    fn rkv_tree_destroy(tree: *mut RawTree);
    fn rkv_tree_match(tree: *mut RawTree, key: *const Key, page_ids: *mut i32, out: *mut Match) -> i32;
    fn rkv_tree_insert(
        tree: *mut RawTree,
        key: *const Key,
        page_ids: *const i32,
        num_pages: usize,
        hint: *const Match,
        priority: i32,
        duplicates: *mut i32,
        out: *mut Insert,
    ) -> i32;
    fn rkv_tree_lock(tree: *mut RawTree, node: u64, delta: *mut i64) -> i32;
    fn rkv_tree_unlock(tree: *mut RawTree, node: u64, delta: *mut i64) -> i32;
    fn rkv_tree_evict(tree: *mut RawTree, num_tokens: i64, backup: i32, out: *mut Freed) -> i32;
    fn rkv_freed_release(freed: *mut Freed);
    fn rkv_tree_check_integrity(
        tree: *mut RawTree,
        device: *const c_void,
        host: *const c_void,
        message: *mut c_char,
        max_bytes: usize,
    ) -> i32;
}

fn text(raw: *const c_char) -> String {
    // SAFETY: the library's strings are never NULL and end with a zero.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}

/// What failed, in the library's words.
#[derive(Debug)]
struct Error {
    status: i32,
    message: String,
}

fn check(status: i32) -> Result<(), Error> {
    if status == RKV_OK {
        return Ok(());
    }
    let message = unsafe { format!("{}: {}", text(rkv_status_string(status)), text(rkv_last_error())) };
    Err(Error { status, message })
}

/// Owns the tree; dropping it destroys the tree.
struct Tree(*mut RawTree);

impl Drop for Tree {
    fn drop(&mut self) {
        unsafe { rkv_tree_destroy(self.0) }
    }
}

impl Tree {
    fn new(page_size: i32) -> Result<Tree, Error> {
        let config = Config {
            struct_size: size_of::<Config>() as u32,
            page_size,
            policy: 0,
            flags: 0,
            max_events: 0,
            page_hash: null(),
            page_hash_ctx: null_mut(),
            digest_bytes: 0,
            reserved: 0,
            reallocate: null(),
            allocator_ctx: null_mut(),
        };
        let mut raw = null_mut();
        check(unsafe { rkv_tree_create(&config, &mut raw) })?;
        Ok(Tree(raw))
    }

    fn key(tokens: &[i32]) -> Key {
        Key {
            struct_size: size_of::<Key>() as u32,
            reserved: 0,
            ns: null(),
            ns_bytes: 0,
            tokens: tokens.as_ptr(),
            num_tokens: tokens.len(),
        }
    }

    /// Returns the answer and the page ids of the hit.
    fn find(&self, tokens: &[i32]) -> Result<(Match, Vec<i32>), Error> {
        let mut found = Match { struct_size: size_of::<Match>() as u32, ..Default::default() };
        let mut page_ids = vec![0; tokens.len() / PAGE];
        check(unsafe { rkv_tree_match(self.0, &Tree::key(tokens), page_ids.as_mut_ptr(), &mut found) })?;
        page_ids.truncate((found.num_tokens + found.host_num_tokens) as usize / PAGE);
        Ok((found, page_ids))
    }

    /// Returns the answer and the ids that stay the caller's.
    fn insert(&self, tokens: &[i32], page_ids: &[i32]) -> Result<(Insert, Vec<i32>), Error> {
        let mut inserted = Insert { struct_size: size_of::<Insert>() as u32, ..Default::default() };
        let mut duplicates = vec![0; page_ids.len()];
        check(unsafe {
            rkv_tree_insert(
                self.0,
                &Tree::key(tokens),
                page_ids.as_ptr(),
                page_ids.len(),
                null(),
                0,
                duplicates.as_mut_ptr(),
                &mut inserted,
            )
        })?;
        duplicates.truncate(inserted.num_duplicates as usize);
        Ok((inserted, duplicates))
    }

    fn lock(&self, node: u64) -> Result<(), Error> {
        check(unsafe { rkv_tree_lock(self.0, node, null_mut()) })
    }

    fn unlock(&self, node: u64) -> Result<(), Error> {
        check(unsafe { rkv_tree_unlock(self.0, node, null_mut()) })
    }

    /// Returns the page ids freed.
    fn evict(&self, num_tokens: i64) -> Result<Vec<i32>, Error> {
        // SAFETY: all zeros but the size is what RKV_INIT makes; the arrays live until rkv_freed_release.
        unsafe {
            let mut freed: Freed = std::mem::zeroed();
            freed.struct_size = size_of::<Freed>() as u32;
            let status = check(rkv_tree_evict(self.0, num_tokens, 0, &mut freed));
            let mut page_ids = Vec::new();
            if freed.num_pages > 0 {
                page_ids.extend_from_slice(std::slice::from_raw_parts(freed.page_ids, freed.num_pages as usize));
            }
            rkv_freed_release(&mut freed);
            status.map(|_| page_ids)
        }
    }

    fn check_integrity(&self) -> Result<(), Error> {
        check(unsafe { rkv_tree_check_integrity(self.0, null(), null(), null_mut(), 0) })
    }
}

/// Owns the index; dropping it destroys the index.
struct Index(*mut RawIndex);

impl Drop for Index {
    fn drop(&mut self) {
        unsafe { rkv_index_destroy(self.0) }
    }
}

impl Index {
    fn new() -> Result<Index, Error> {
        let mut raw = null_mut();
        check(unsafe { rkv_index_create(null(), &mut raw) })?;
        Ok(Index(raw))
    }

    fn insert(&self, worker: u32, page_keys: &[u64]) -> Result<(), Error> {
        check(unsafe { rkv_index_insert(self.0, worker, page_keys.as_ptr(), page_keys.len(), null(), null_mut()) })
    }

    /// (worker, leading pages of the prompt that it holds), for at most 64 workers.
    fn find(&self, page_keys: &[u64]) -> Result<Vec<(u32, u32)>, Error> {
        let (mut workers, mut pages) = ([0u32; 64], [0u32; 64]);
        // SAFETY: all zeros but the size is what RKV_INIT makes.
        let mut hit: IndexHit = unsafe { std::mem::zeroed() };
        hit.struct_size = size_of::<IndexHit>() as u32;
        hit.workers = workers.as_mut_ptr();
        hit.pages = pages.as_mut_ptr();
        hit.max_workers = workers.len();
        check(unsafe { rkv_index_find(self.0, page_keys.as_ptr(), page_keys.len(), &mut hit) })?;
        Ok((0..hit.num_workers).map(|i| (workers[i], pages[i])).collect())
    }
}

fn main() -> Result<(), Error> {
    let first: Vec<i32> = (0..16).collect();
    let second: Vec<i32> = (0..16).map(|i| if i < 8 { i } else { 100 + i }).collect();
    let tree = Tree::new(PAGE as i32)?;
    assert!(tree.insert(&first, &[0, 1, 2, 3])?.1.is_empty(), "the first prompt is new");
    let (inserted, duplicates) = tree.insert(&second, &[10, 11, 12, 13])?;
    assert_eq!(duplicates, [10, 11], "pages 10 and 11 stay with the engine");

    let (found, page_ids) = tree.find(&second)?;
    assert_eq!((found.num_tokens, page_ids), (16, vec![0, 1, 12, 13]), "the second prompt is cached");

    tree.lock(found.device_node)?;
    let under_lock = tree.evict(1000)?;
    assert_eq!(under_lock, [2, 3], "only the first prompt's own tail may go");
    tree.unlock(found.device_node)?;
    let refused = tree.unlock(found.device_node).expect_err("one unlock too many is an error");
    assert_eq!(refused.status, RKV_ERR_LOCK);
    assert!(refused.message.len() > text(unsafe { rkv_status_string(RKV_ERR_LOCK) }).len() + 2, "with words");
    tree.check_integrity()?;
    assert_eq!(tree.evict(1000)?.len(), 4, "evict the rest");

    let index = Index::new()?;
    index.insert(7, &[11, 22])?;
    index.insert(9, &[11])?;
    let found = index.find(&[11, 22, 33])?;
    assert_eq!(found, [(7, 2), (9, 1)], "who holds the prompt");
    println!(
        "radixkv {} from Rust: {} tokens shared, {} duplicates, {} evicted under a lock, unlock twice: {}, index: {} pages",
        text(unsafe { rkv_version() }),
        inserted.prefix_tokens,
        duplicates.len(),
        under_lock.len() * PAGE,
        text(unsafe { rkv_status_string(RKV_ERR_LOCK) }),
        found[0].1
    );
    Ok(())
}
