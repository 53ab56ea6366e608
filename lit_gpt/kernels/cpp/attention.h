// What attention is told of its tensors.
#pragma once

namespace {

// (B, heads, T, size) with elements of a head next to each other
template <class T> struct Heads {
    T *data;
    long batch, head, token;

    T *at(long b, long h, long t) const { return data + b * batch + h * head + t * token; }
};

struct Sizes {
    int batch, heads, groups, size, samples;
    const int *offsets;  // where the samples of a row begin, and where the last ends
    float scale;
    int window;  // positions that a query sees, its own included
    int before;  // keys before those of the first query, of a single sample

    int total() const { return offsets[samples]; }
    long items() const { return (long)batch * samples * heads; }
};

}  // namespace
