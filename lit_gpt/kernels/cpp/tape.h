// A tape of stages, and how threads share them: they take the pieces of one stage after another from a number that
// they share. A thread that the system has given to others holds up at most the piece it was at: the rest go to who is
// there.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <vector>

namespace {

struct Span {
    long begin, end;
};

// What a LoRA adds to a layer's output y = W x: B^T (A x), where both have `rank` rows.
struct Update {
    const void *A, *B;
    long rank;
};

// What is particular to a row: its LoRA's updates of the layers, unless it has none; `extended`: its angles are those
// of a long sequence.
struct Row {
    long token, position;
    const Update *updates;
    long extended;

    Update update(long layer) const { return updates ? updates[layer] : Update{nullptr, nullptr, 0}; }
};

struct Run {
    const Row *rows;
    long n;              // rows
    void *const *cache;  // keys and values of each layer in turn, (n, groups, places, size) each
    long places;
    int threads;
};

// Pieces that no thread has to wait for another to begin: `calls` one after the other on the elements of a piece, each
// of which reads only that piece of what those before it have made.
struct Stage {
    long elements;     // in multiples of `grain`
    bool by_row;       // so many for each row of a run, else for all
    long grain, work;  // multiplications for each element
    std::vector<std::function<void(const Run &, Span)>> calls;

    long count(const Run &run) const { return by_row ? elements * run.n : elements; }

    // As many for each thread; more of them where each is still long against taking it.
    long pieces(const Run &run) const {
        if (by_row) return std::min(count(run), 4l * run.threads);
        return run.threads * std::max(1l, std::min(16l, elements * work / (run.threads * ENOUGH)));
    }

    void run(const Run &run, long piece, long pieces) const {
        long n = count(run), each = (n + pieces * grain - 1) / (pieces * grain) * grain;
        Span span{std::min(n, piece * each), std::min(n, (piece + 1) * each)};
        for (auto &call : calls) call(run, span);
    }

    static constexpr long ENOUGH = 1 << 19;
};

inline void pause() {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    asm volatile("yield");
#endif
}

// Counts the pieces of a run that were taken and those that are done, in the order of its stages. Who waits does not
// watch for long: where more wants to run than there are cores, it would keep the core from what it waits for.
class Progress {
    alignas(64) std::atomic<long> taken{0};
    alignas(64) std::atomic<long> done{0};
    std::atomic<int> asleep{0};
    std::mutex mutex;
    std::condition_variable changed;
    static constexpr int WATCHED = 2000;  // times, some ten microseconds: longer than what pieces differ by

  public:
    void restart() { taken = 0, done = 0; }

    // Returns the next piece, if it comes before `end`, else -1.
    long take(long end) {
        long piece = taken.load(std::memory_order_relaxed);
        while (piece < end)
            if (taken.compare_exchange_weak(piece, piece + 1, std::memory_order_relaxed)) return piece;
        return -1;
    }

    // Tells that `n` pieces are done, which may be the last ones before `end`.
    void add(long n, long end) {
        if (done.fetch_add(n) + n < end || !asleep) return;
        std::lock_guard<std::mutex> lock(mutex);  // who is about to sleep does so first
        changed.notify_all();
    }

    // Returns when all pieces before `end` are done.
    void wait(long end) {
        for (int i = 0; i < WATCHED; i++, pause())
            if (done.load(std::memory_order_acquire) >= end) return;
        std::unique_lock<std::mutex> lock(mutex);
        asleep++;
        changed.wait(lock, [&] { return done >= end; });
        asleep--;
    }
};

struct Tape {
    std::vector<Stage> stages;
    Progress progress;

    // An operation on n elements of each row, called as f(run, span) for so many of them; `follows`: it reads only the
    // same elements of what other operations made; `work`: multiplications for an element.
    template <class F> void elements(long n, bool follows, F f, long work = 1) {
        if (!follows || stages.empty() || stages.back().by_row || stages.back().elements != n)
            stages.push_back({n, false, 16, work, {}});
        stages.back().calls.push_back(f);
    }

    // An operation on n elements of each row, called row by row: f(run, row, span).
    template <class F> void elements_of_rows(long n, bool follows, F f) {
        elements(n, follows, [=](const Run &run, Span span) {
            for (long row = 0; row < run.n; row++) f(run, row, span);
        });
    }

    // An operation on n larger things of each row: f(run, row, thing).
    template <class F> void items(long n, F f) {
        auto call = [=](const Run &run, Span span) {
            for (long i = span.begin; i < span.end; i++) f(run, i / n, i % n);
        };
        stages.push_back({n, true, 1, 0, {call}});
    }

    // What each thread does of a run.
    void take_part(const Run &run) {
        long begin = 0, end;  // the pieces of a stage
        for (auto &stage : stages) {
            long pieces = stage.pieces(run), mine = 0;
            end = begin + pieces;
            progress.wait(begin);
            for (long piece; (piece = progress.take(end)) >= 0; mine++) stage.run(run, piece - begin, pieces);
            if (mine) progress.add(mine, end);
            begin = end;
        }
    }
};

}  // namespace
