// What was chosen before, by everything that it was chosen by. Bounded: the one that was not used
// for longest makes room. One lock, held for the look-up alone.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <unordered_map>

namespace redline::cuda {

// What may run, best first. One stands; what stood before it failed.
template <typename Choice, int most>
class Choices {
 public:
  static constexpr int capacity = most;

  void add(const Choice& choice) { list_[count_++] = choice; }

  // Null where none is left.
  const Choice* standing() const { return standing_ < count_ ? &list_[standing_] : nullptr; }
  int number() const { return standing_; }

  // Puts the next one in place of number `failed`, unless another thread has; false where none is.
  bool replace(int failed) {
    if (standing_ == failed) ++standing_;
    return standing_ < count_;
  }

 private:
  std::array<Choice, most> list_ = {};
  int count_ = 0, standing_ = 0;
};

// Keys are compared, and hashed, as memory.
template <typename Key, typename Plan>
class PlanCache {
  static_assert(std::has_unique_object_representations_v<Key> && sizeof(Key) % 8 == 0);

 public:
  explicit PlanCache(size_t capacity) : capacity_(capacity) {}

  // Calls use(Plan&) under the lock; false where the key has no plan.
  template <typename Use>
  bool use(const Key& key, Use use) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(key);
    if (found == entries_.end()) return false;
    found->second.used = ++clock_;
    use(found->second.plan);
    return true;
  }

  // A plan that another thread put there meanwhile stays.
  void put(const Key& key, const Plan& plan) {
    const std::lock_guard lock(mutex_);
    if (entries_.size() >= capacity_ && !entries_.contains(key)) drop_oldest();
    entries_.try_emplace(key, Entry{plan, ++clock_});
  }

  void forget(const Key& key) {
    const std::lock_guard lock(mutex_);
    entries_.erase(key);
  }

  size_t size() const {
    const std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  struct Entry {
    Plan plan;
    uint64_t used;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t words[sizeof(Key) / 8], hash = 0;
      std::memcpy(words, &key, sizeof(Key));
      for (const uint64_t word : words) {
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };
  struct Equal {
    bool operator()(const Key& a, const Key& b) const {
      return std::memcmp(&a, &b, sizeof(Key)) == 0;
    }
  };

  void drop_oldest() {
    auto oldest = entries_.begin();
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->second.used < oldest->second.used) oldest = entry;
    }
    if (oldest != entries_.end()) entries_.erase(oldest);
  }

  const size_t capacity_;
  mutable std::mutex mutex_;
  uint64_t clock_ = 0;
  std::unordered_map<Key, Entry, Hash, Equal> entries_;
};

}  // namespace redline::cuda
