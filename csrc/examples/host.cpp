// A C++17 host: the tree and the freed pages as objects that clean up after themselves, statuses as exceptions.
//
//   c++ -std=c++17 host.cpp $(pkg-config --cflags --libs radixkv) -Wl,-rpath,$(pkg-config --variable=libdir radixkv) && ./a.out
#include <radixkv/radixkv.h>

#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

class Error : public std::runtime_error {
public:
    explicit Error(rkv_status status)
        : std::runtime_error(std::string(rkv_status_string(status)) + ": " + rkv_last_error()), status(status)
    {
    }
    const rkv_status status;
};

void check(rkv_status status)
{
    if (status != RKV_OK) {
        throw Error(status);
    }
}

template <class Struct>
Struct sized()
{
    Struct value;
    RKV_INIT(&value);
    return value;
}

// Pages that left the tree; valid until the next call that fills the same object.
class Freed {
public:
    Freed() : raw(sized<rkv_freed>()) {}
    ~Freed() { rkv_freed_release(&raw); }
    Freed(const Freed &) = delete;
    Freed &operator=(const Freed &) = delete;
    rkv_freed raw;
};

class Tree {
public:
    explicit Tree(int32_t page_size, int32_t policy = RKV_POLICY_LRU) : page_size_(page_size)
    {
        auto config = sized<rkv_tree_config>();
        config.page_size = page_size;
        config.policy = policy;
        rkv_tree *tree = nullptr;
        check(rkv_tree_create(&config, &tree));
        tree_.reset(tree);
    }

    rkv_match match(const std::vector<int32_t> &tokens, std::vector<int32_t> &page_ids)
    {
        auto key = make_key(tokens);
        auto result = sized<rkv_match>();
        page_ids.resize(tokens.size() / static_cast<size_t>(page_size_));
        check(rkv_tree_match(tree_.get(), &key, page_ids.data(), &result));
        page_ids.resize(static_cast<size_t>((result.num_tokens + result.host_num_tokens) / page_size_));
        return result;
    }

    // Returns the ids that stay the caller's.
    std::vector<int32_t> insert(const std::vector<int32_t> &tokens, const std::vector<int32_t> &page_ids, rkv_insert &result)
    {
        auto key = make_key(tokens);
        std::vector<int32_t> duplicates(page_ids.size());
        result = sized<rkv_insert>();
        check(rkv_tree_insert(tree_.get(), &key, page_ids.data(), page_ids.size(), nullptr, 0, duplicates.data(), &result));
        duplicates.resize(result.num_duplicates);
        return duplicates;
    }

    void lock(rkv_node node) { check(rkv_tree_lock(tree_.get(), node, nullptr)); }
    void unlock(rkv_node node) { check(rkv_tree_unlock(tree_.get(), node, nullptr)); }
    void evict(int64_t num_tokens, Freed &freed) { check(rkv_tree_evict(tree_.get(), num_tokens, 0, &freed.raw)); }

    void check_integrity()
    {
        char message[256] = "";
        if (rkv_tree_check_integrity(tree_.get(), nullptr, nullptr, message, sizeof message) != RKV_OK) {
            throw std::logic_error(message);
        }
    }

private:
    struct Destroy {
        void operator()(rkv_tree *tree) const { rkv_tree_destroy(tree); }
    };

    static rkv_key make_key(const std::vector<int32_t> &tokens)
    {
        auto key = sized<rkv_key>();
        key.tokens = tokens.data();
        key.num_tokens = tokens.size();
        return key;
    }

    std::unique_ptr<rkv_tree, Destroy> tree_;
    int32_t page_size_;
};

class Index {
public:
    Index()
    {
        rkv_index *index = nullptr;
        check(rkv_index_create(nullptr, &index));
        index_.reset(index);
    }

    void insert(uint32_t worker, const std::vector<uint64_t> &page_keys)
    {
        check(rkv_index_insert(index_.get(), worker, page_keys.data(), page_keys.size(), nullptr, nullptr));
    }

    // Worker -> leading pages of the prompt that it holds. Asks again with larger buffers until the answer fits.
    std::map<uint32_t, uint32_t> find(const std::vector<uint64_t> &page_keys)
    {
        std::vector<uint32_t> workers, pages;
        auto hit = sized<rkv_index_hit>();
        rkv_status status;
        do {
            workers.resize(hit.num_workers);
            pages.resize(hit.num_workers);
            hit.workers = workers.data();
            hit.pages = pages.data();
            hit.max_workers = workers.size();
            status = rkv_index_find(index_.get(), page_keys.data(), page_keys.size(), &hit);
        } while (status == RKV_ERR_CAPACITY);
        check(status);
        std::map<uint32_t, uint32_t> found;
        for (size_t i = 0; i < hit.num_workers; i++) {
            found[workers[i]] = pages[i];
        }
        return found;
    }

private:
    struct Destroy {
        void operator()(rkv_index *index) const { rkv_index_destroy(index); }
    };
    std::unique_ptr<rkv_index, Destroy> index_;
};

void expect(bool fine, const char *what)
{
    if (!fine) {
        throw std::logic_error(what);
    }
}

void run()
{
    std::vector<int32_t> first, second, page_ids;
    for (int32_t i = 0; i < 16; i++) {
        first.push_back(i);
        second.push_back(i < 8 ? i : 100 + i);
    }
    Tree tree(4);
    rkv_insert inserted;
    expect(tree.insert(first, {0, 1, 2, 3}, inserted).empty(), "the first prompt is new");
    const auto duplicates = tree.insert(second, {10, 11, 12, 13}, inserted);
    expect(duplicates == std::vector<int32_t>({10, 11}), "pages 10 and 11 stay with the engine");

    const auto match = tree.match(second, page_ids);
    expect(match.num_tokens == 16 && page_ids == std::vector<int32_t>({0, 1, 12, 13}), "the second prompt is cached");

    Freed freed;
    tree.lock(match.device_node);
    tree.evict(1000, freed);
    const auto under_lock = freed.raw.num_tokens;
    tree.unlock(match.device_node);
    std::string refused;
    try {
        tree.unlock(match.device_node);
    } catch (const Error &error) {
        expect(error.status == RKV_ERR_LOCK, "one unlock too many");
        refused = rkv_status_string(error.status);
    }
    tree.check_integrity();
    tree.evict(1000, freed);
    expect(freed.raw.num_tokens == 16, "evict the rest");

    Index index;
    index.insert(7, {11, 22});
    index.insert(9, {11});
    const auto found = index.find({11, 22, 33});
    expect(found == std::map<uint32_t, uint32_t>({{7, 2}, {9, 1}}), "who holds the prompt");
    std::printf("radixkv %s from C++: %d tokens shared, %zu duplicates, %d evicted under a lock, unlock twice: %s, "
                "index: %u pages\n",
                rkv_version(), static_cast<int>(inserted.prefix_tokens), duplicates.size(), static_cast<int>(under_lock),
                refused.c_str(), static_cast<unsigned>(found.at(7)));
}

} // namespace

int main()
{
    try {
        run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "host.cpp: %s\n", error.what());
        return 1;
    }
    return 0;
}
