// Mixed operations on channels-last images: separable convolutions, poolings, batch norms, sums.
//
// Separable convolutions: E operations have C channels each: a rectified input, a depthwise k×k
// kernel and a pointwise C×C kernel. Work is divided into bands of rows of one image, small enough
// that a band, the depthwise result and its gradient stay in a core's cache: none of them is ever
// written to main memory. In a band, channels are padded to whole vectors and borders are zeros, so
// the inner loops have no conditions.
//
// Batch norms are never written to memory either, nor are their gradients: both are affine by
// channel, and whoever reads a tensor applies them to what it reads.
//
// Kernels are called by `run`. Their arguments, and the fields of the structures that they take,
// are words of 8 bytes each.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
// Without OpenMP its pragmas say nothing, and there is one thread.
static void omp_set_num_threads(int) {}
static int omp_get_max_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

struct Shape {
  // E operations of C channels; whether all read the same C channels, or each its own block. Of
  // the image, height × width pixels are read: all, or every second of every second row (step 2).
  long n, image_height, image_width, height, width, step;
  long channels, operations, shared, kernel, stride, dilation;

  long out(long size) const { return (size - 1) / stride + 1; }
  long reach() const { return dilation * (kernel - 1) / 2; }
  long read() const { return shared ? channels : operations * channels; }
  long block(long operation) const { return shared ? 0 : operation * channels; }
  long written() const { return operations * channels; }
};

template <class T> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64))); };

template <class T> constexpr long LANES = 64 / sizeof(T);
constexpr long BAND_BYTES = 1 << 19;

long padded(long channels, long lanes) { return (channels + lanes - 1) / lanes * lanes; }

// Aligned memory, zeros at first. A static one outlives the call, which spares page faults.
template <class T> class Scratch {
  std::vector<T> memory;

public:
  T *get(long size) {
    if (long(memory.size()) < size + LANES<T>) memory.resize(size + LANES<T>);
    auto address = reinterpret_cast<size_t>(memory.data());
    return reinterpret_cast<T *>((address + 63) / 64 * 64);
  }
};

template <class T> using V = typename Vector<T>::type;
template <class T> const V<T> &load(const T *p) { return *reinterpret_cast<const V<T> *>(p); }
template <class T> V<T> &at(T *p) { return *reinterpret_cast<V<T> *>(p); }

// Asks for values that are soon read, or written, so that they come while others are computed with.
template <bool WRITTEN = false, class T> void fetch(const T *from, long count) {
  for (long i = 0; i < count; i += LANES<T>) __builtin_prefetch(from + i, WRITTEN);
}

// N values at any address.
template <class T, long N> struct Values {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T))));
};
template <class T> struct Values<T, 1> {
  typedef T type;
};
template <class T, long N> using P = typename Values<T, N>::type;
template <long N, class T> P<T, N> as(const T *p) {
  return *reinterpret_cast<const P<T, N> *>(p);
}

// Where N values are written, at any address; a reference to P would lose its alignment in clang.
template <class T, long N> struct Target {
  T *p;

  void operator=(P<T, N> values) const { *reinterpret_cast<P<T, N> *>(p) = values; }
  void operator+=(P<T, N> values) const { *reinterpret_cast<P<T, N> *>(p) += values; }
};
template <long N, class T> Target<T, N> into(T *p) { return {p}; }

// N values in double precision.
template <long N, class From> P<double, N> wide(From values) {
  if constexpr (N == 1)
    return values;
  else
    return __builtin_convertvector(values, P<double, N>);
}

// Sums of two quantities of N channels each.
template <class T, long N> struct Pair {
  P<T, N> first, second;

  void add_to(double *firsts, double *seconds) const {
    into<N>(firsts) += wide<N>(first), into<N>(seconds) += wide<N>(second);
  }
};

// body<N>(c) for all channels, N from c on: whole vectors, halves and quarters, then one by one.
template <class T, class Body> void by_channel(long channels, Body body) {
  constexpr long WHOLE = LANES<T>, HALF = WHOLE / 2, QUARTER = WHOLE / 4;
  long c = 0;
  for (; c + WHOLE <= channels; c += WHOLE) body.template operator()<WHOLE>(c);
  if (c + HALF <= channels) body.template operator()<HALF>(c), c += HALF;
  if (c + QUARTER <= channels) body.template operator()<QUARTER>(c), c += QUARTER;
  for (; c < channels; c++) body.template operator()<1>(c);
}

// to[step·x] (+)= Σ_taps from[row + dilation·ky][stride·x + dilation·kx] · weight[tap].
template <class T, int KY, int KX, bool ADD, int STRIDE, int DILATION>
void depthwise_of(T *to, long step, const T *from, long row, const T *weight, long width,
                  long lanes) {
  constexpr int BLOCK = 8;
  for (long v = 0; v < lanes; v += LANES<T>) {
    long x = 0;
    auto block = [&]<int B>() {
      constexpr int READ = (B - 1) * STRIDE + (KX - 1) * DILATION + 1;
      V<T> sum[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) sum[b] = ADD ? load(to + (x + b) * step * lanes + v) : V<T>{};
#pragma GCC unroll 8
      for (int ky = 0; ky < KY; ky++) {
        // Neighbours share what they read: it stays in registers.
        V<T> read[READ];
        const T *start = from + ky * DILATION * row + x * STRIDE * lanes + v;
#pragma GCC unroll 32
        for (int b = 0; b < READ; b++) read[b] = load(start + b * lanes);
#pragma GCC unroll 8
        for (int kx = 0; kx < KX; kx++) {
          const V<T> w = load(weight + (ky * KX + kx) * lanes + v);
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) sum[b] += read[b * STRIDE + kx * DILATION] * w;
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) at(to + (x + b) * step * lanes + v) = sum[b];
      x += B;
    };
    while (x + BLOCK <= width) block.template operator()<BLOCK>();
    if (x + BLOCK / 2 <= width) block.template operator()<BLOCK / 2>();
    while (x < width) block.template operator()<1>();
  }
}

// The dilation is 1, or 2 at stride 1.
template <class T, int KY, int KX, bool ADD>
void depthwise_row(T *to, long step, const T *from, long row, const T *weight, long width,
                   long stride, long dilation, long lanes) {
  const auto own = stride == 2     ? depthwise_of<T, KY, KX, ADD, 2, 1>
                   : dilation == 2 ? depthwise_of<T, KY, KX, ADD, 1, 2>
                                   : depthwise_of<T, KY, KX, ADD, 1, 1>;
  own(to, step, from, row, weight, width, lanes);
}

// to[x][·] = Σ_c from[x][c] · matrix[c][·], where to[x] are `apart` and from[x] `stride` values.
template <class T>
void pointwise_row(T *to, long apart, const T *from, long stride, const T *matrix, long width,
                   long channels, long lanes) {
  long v = 0, x = 0;
  auto block = [&]<int B, int N>() {
    V<T> sum[B][N] = {};
#pragma GCC unroll 4
    for (long c = 0; c < channels; c++) {
      V<T> w[N];
      for (int n = 0; n < N; n++) w[n] = load(matrix + c * lanes + v + n * LANES<T>);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const T value = from[(x + b) * stride + c];
        for (int n = 0; n < N; n++) sum[b][n] += value * w[n];
      }
    }
    for (int b = 0; b < B; b++)
      for (int n = 0; n < N; n++)
        into<LANES<T>>(to + (x + b) * apart + v + n * LANES<T>) = sum[b][n];
    x += B;
  };
  auto columns = [&]<int B, int N>() {
    for (x = 0; x + B <= width;) block.template operator()<B, N>();
    if (x + B / 2 <= width) block.template operator()<B / 2, N>();
    while (x < width) block.template operator()<1, N>();
    v += N * LANES<T>;
  };
  while (v + 4 * LANES<T> <= lanes) columns.template operator()<4, 4>();
  while (v + 2 * LANES<T> <= lanes) columns.template operator()<8, 2>();
  while (v < lanes) columns.template operator()<8, 1>();
}

// sum[a][·] += Σ_x left[x][a] · right[x][·], where left[x] are `stride` values.
template <class T>
void add_outer(T *sum, const T *left, long stride, const T *right, long width, long channels,
               long lanes) {
  for (long v = 0; v < lanes; v += LANES<T>) {
    auto block = [&]<int B>(long a) {
      V<T> part[B];
      for (int b = 0; b < B; b++) part[b] = load(sum + (a + b) * lanes + v);
      for (long x = 0; x < width; x++) {
        const V<T> r = load(right + x * lanes + v);
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) part[b] += left[x * stride + a + b] * r;
      }
      for (int b = 0; b < B; b++) at(sum + (a + b) * lanes + v) = part[b];
    };
    long a = 0;
    for (; a + 16 <= channels; a += 16) block.template operator()<16>(a);
    for (; a < channels; a++) block.template operator()<1>(a);
  }
}

// sum[tap] += Σ_x from[row + dilation·ky][stride·x + dilation·kx] · gradient[x].
template <class T, int K>
void add_taps(T *sum, const T *from, long row, const T *gradient, long width, long stride,
              long dilation, long lanes) {
  for (long v = 0; v < lanes; v += LANES<T>) {
    auto lines = [&]<int N>(int first) {
      V<T> part[N * K];
      T *to = sum + first * K * lanes + v;
      for (int t = 0; t < N * K; t++) part[t] = load(to + t * lanes);
      for (long x = 0; x < width; x++) {
        const V<T> g = load(gradient + x * lanes + v);
        const T *start = from + first * dilation * row + x * stride * lanes + v;
#pragma GCC unroll 8
        for (int ky = 0; ky < N; ky++)
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++)
            part[ky * K + kx] += load(start + ky * dilation * row + kx * dilation * lanes) * g;
      }
      for (int t = 0; t < N * K; t++) at(to + t * lanes) = part[t];
    };
    constexpr int LINES = K == 3 ? 3 : 2;
    for (int ky = 0; ky + LINES <= K; ky += LINES) lines.template operator()<LINES>(ky);
    if constexpr (K % LINES) lines.template operator()<K % LINES>(K - K % LINES);
  }
}

// The kernels of every operation, laid out for the loops above.
template <class T> struct Kernels {
  T *depthwise, *reversed, *pointwise, *transposed;
  long lanes, taps;

  Kernels(const Shape &s, const T *const *wd, const T *const *wp)
      : lanes(padded(s.channels, LANES<T>)), taps(s.kernel * s.kernel) {
    const long d = s.operations * taps * lanes, p = s.operations * s.channels * lanes;
    static thread_local Scratch<T> memory;
    depthwise = memory.get(2 * (d + p));
    reversed = depthwise + d, pointwise = reversed + d, transposed = pointwise + p;
    std::vector<long> order(taps);
    for (long a = 0, position = 0; a < s.stride; a++)
      for (long b = 0; b < s.stride; b++)
        for (long y = met(s, a) - 1; y >= 0; y--)
          for (long x = met(s, b) - 1; x >= 0; x--)
            order[position++] = (a + y * s.stride) * s.kernel + b + x * s.stride;
    for (long e = 0; e < s.operations; e++)
      for (long c = 0; c < s.channels; c++) {
        for (long t = 0; t < taps; t++) {
          depthwise[(e * taps + t) * lanes + c] = wd[e][c * taps + t];
          reversed[(e * taps + t) * lanes + c] = wd[e][c * taps + order[t]];
        }
        for (long i = 0; i < s.channels; i++) {
          const T value = wp[e][c * s.channels + i];
          pointwise[(e * s.channels + c) * lanes + i] = value;
          transposed[(e * s.channels + i) * lanes + c] = value;
        }
      }
  }

  // Taps a, a + stride, … of a line of the kernel: an input pixel meets these alone, the a of its
  // own parity. `reversed` has the taps that meet pixels of parities (a, b) together, backwards.
  static long met(const Shape &s, long a) { return (s.kernel - a + s.stride - 1) / s.stride; }
};

// What is found for a batch norm of x, from the gradient g for its result: what makes it the
// gradient for x, factor · g + slope · x + offset,
//   ∂x = (scale · weight / std) · (g − (∂bias + x̂ ∂weight) / rows),
// where slope and offset are added to, since several norms may have the same x; and
//   ∂bias = Σ g,  ∂weight = Σ g x̂,  ∂scale = Σ_c ∂weight,
// those that are not null.
template <class T> struct NormGradient {
  T *factor, *slope, *offset, *of_weight, *of_bias, *of_scale;
};

// A batch norm of C channels: x̂ = (x − mean) / std times scale · weight, plus bias. Null stands for
// a mean or bias of 0, a std, weight or scale of 1. `fixed`: x has no part in mean and std.
template <class T> struct Norm {
  const T *mean, *var;
  double eps;
  const T *weight, *bias, *scale;
  long fixed;

  double deviation(long c) const { return var ? 1 / std::sqrt(var[c] + eps) : 1; }
  double slope(long c) const {
    return deviation(c) * (weight ? weight[c] : T(1)) * (scale ? *scale : T(1));
  }

  // What makes it factor · x + offset.
  void write(long channels, T *factor, T *offset) const {
    for (long c = 0; c < channels; c++) {
      factor[c] = T(slope(c));
      offset[c] = T((bias ? bias[c] : T(0)) - (mean ? slope(c) * mean[c] : 0));
    }
  }

  // From Σ g and Σ g · (x − mean) over `rows` pixels, g given for the result, what is `found`.
  void differentiate(long channels, long rows, const double *sum, const double *product,
                     const NormGradient<T> &found) const {
    double of_scale = 0;
    for (long c = 0; c < channels; c++) {
      const double scaled = product[c] * deviation(c);
      found.factor[c] = T(slope(c));
      of_scale += scaled;
      if (found.of_weight) found.of_bias[c] = T(sum[c]), found.of_weight[c] = T(scaled);
      if (fixed) continue;
      const double own = -slope(c) * deviation(c) * scaled / rows;
      found.slope[c] += T(own);
      found.offset[c] -= T(slope(c) * sum[c] / rows + own * mean[c]);
    }
    if (found.of_scale) *found.of_scale = T(of_scale);
  }
};

// factor · x + offset, of N channels.
template <class T, long N> struct Affine {
  P<T, N> factor, offset;

  P<T, N> operator()(P<T, N> x) const { return factor * x + offset; }
};

// What the operations read: relu(factor · x + offset) by channel.
template <class T> struct Input {
  const T *x;
  const Shape &shape;
  std::vector<T> factors;

  Input(const T *x, const Shape &shape, const Norm<T> &norm)
      : x(x), shape(shape), factors(2 * shape.read()) {
    norm.write(shape.read(), factors.data(), factors.data() + shape.read());
  }
  long index(long n, long row, long column) const {
    const long line = n * shape.image_height + row * shape.step;
    return (line * shape.image_width + column * shape.step) * shape.read();
  }
  long distance() const { return shape.step * shape.read(); } // of neighbours
  template <long N> Affine<T, N> affine(long channel) const {
    return {as<N>(factors.data() + channel), as<N>(factors.data() + shape.read() + channel)};
  }
};

// What is given for a result y behind a batch norm: the gradient for the norm's result, and by
// channel what makes it the gradient for y: factor · given + slope · y + offset.
template <class T> struct Gradient {
  const T *const *given; // of each operation, a pixel every `stride` values
  long stride;
  const T *y, *factors; // factor, slope and offset, each `distance` after the one before
  long distance, width; // width: values of a pixel of y

  template <long N> P<T, N> read(long pixel, long operation, long block, long channel) const {
    const long at = block + channel;
    const T *own = factors + at;
    return as<N>(own) * as<N>(given[operation] + pixel * stride + channel) +
           as<N>(own + distance) * as<N>(y + pixel * width + at) + as<N>(own + 2 * distance);
  }
  // Of `count` pixels, one every `lanes` values, so many channels of an operation: they begin at
  // `start` in y, and at `own_start` in what is given for the operation.
  void copy(T *to, long lanes, long pixel, long count, long operation, long start, long own_start,
            long channels) const {
    by_channel<T>(channels, [&]<long N>(long c) {
      const T *own = factors + start + c;
      const P<T, N> factor = as<N>(own), slope = as<N>(own + distance);
      const P<T, N> offset = as<N>(own + 2 * distance);
      const T *from = given[operation] + pixel * stride + own_start + c;
      const T *result = y + pixel * width + start + c;
      for (long x = 0; x < count; x++) {
        fetch(from + (x + count) * stride, 1), fetch(result + (x + count) * width, 1);
        into<N>(to + x * lanes + c) =
            factor * as<N>(from + x * stride) + slope * as<N>(result + x * width) + offset;
      }
    });
  }
};

// Rows of an image with zeros around it: rows [first, first + count), columns from −reach on.
template <class T> struct Rows {
  T *data;
  long first, count, row, lanes, reach;

  long size() const { return count * row; }
  T *at_row(long y) const { return data + (y - first) * row; }

  // Zeros around the `height` × `width` pixels of the image; within them are the caller's.
  void surround(long height, long width) {
    for (long y = first; y < first + count; y++) {
      const bool inside = y >= 0 && y < height;
      T *line = at_row(y), *right = line + (reach + width) * lanes;
      std::fill(line, inside ? line + reach * lanes : line + row, T(0));
      if (inside) std::fill(right, line + row, T(0));
    }
  }

  // Rectified channels of the block of one operation, of image n.
  void rectify(const Input<T> &input, long n, long operation) {
    const Shape &s = input.shape;
    const long block = s.block(operation), start = std::max(first, 0L);
    surround(s.height, s.width);
    const long distance = input.distance();
    by_channel<T>(s.channels, [&]<long N>(long c) {
      const auto affine = input.template affine<N>(block + c);
      for (long y = start; y < std::min(first + count, s.height); y++) {
        const T *from = input.x + input.index(n, y, 0) + block + c;
        T *to = at_row(y) + reach * lanes + c;
        for (long i = 0; i < s.width; i++) {
          const P<T, N> value = affine(as<N>(from + i * distance));
          into<N>(to + i * lanes) = value < 0 ? P<T, N>{} : value;
        }
      }
    });
  }
};

// Σ_x of the pair values(x), of N channels.
template <class T, long N, class Values> Pair<T, N> pair_sums(long width, Values values) {
  constexpr int PARTS = 4; // so that no addition waits for the one before it
  Pair<T, N> sums[PARTS] = {};
  auto add = [&](long x, int part) {
    const Pair<T, N> pair = values(x);
    sums[part].first += pair.first, sums[part].second += pair.second;
  };
  long x = 0;
  for (; x + PARTS <= width; x += PARTS)
    for (int part = 0; part < PARTS; part++) add(x + part, part);
  for (; x < width; x++) add(x, 0);
  for (int part = 1; part < PARTS; part++)
    sums[0].first += sums[part].first, sums[0].second += sums[part].second;
  return sums[0];
}

// Σ x and Σ x² of each channel, in double precision, of pixels added a row at a time.
template <class T> struct Moments {
  double *sum, *square;

  // Of N channels from c on, of pixels at from[x · stride].
  template <long N> void add(const T *from, long stride, long width, long c) {
    // Differences from a pixel of the row lose no digits to a mean far from zero.
    const P<T, N> origin = as<N>(from);
    const auto sums = pair_sums<T, N>(width, [&](long x) {
      const P<T, N> difference = as<N>(from + x * stride) - origin;
      return Pair<T, N>{difference, difference * difference};
    });
    const auto once = wide<N>(sums.first), shift = wide<N>(origin);
    into<N>(sum + c) += once + double(width) * shift;
    into<N>(square + c) += wide<N>(sums.second) + shift * (2.0 * once + double(width) * shift);
  }
  // Means and biased variances of `count` pixels of so many channels.
  void write(long channels, double count, T *mean, T *var) const {
    for (long c = 0; c < channels; c++) {
      const double centre = sum[c] / count;
      mean[c] = T(centre);
      var[c] = T(std::max(0.0, square[c] / count - centre * centre));
    }
  }
};

// Sums by thread, whose parts are added up at the end. Those that live at the same time differ in
// their PLACE.
template <class S, int PLACE = 0> class Sums {
  const long size;
  S *start;

public:
  const long threads = omp_get_max_threads();

  explicit Sums(long count) : size(padded(count, LANES<S>)) {
    static thread_local Scratch<S> memory;
    start = memory.get(size * threads);
    std::fill_n(start, size * threads, S(0));
  }
  S *own() { return start + omp_get_thread_num() * size; }
  // Once.
  S *total() {
    for (long t = 1; t < threads; t++)
      for (long i = 0; i < size; i++) start[i] += start[t * size + i];
    return start;
  }
};

// Rows of so many pixels that are worked on together, so that short ones do not cost more.
long lines_of(long cols) { return std::max(1L, 64 / cols); }

// y, and the mean and biased variance of each of its channels, one after the other, unless null.
template <class T, int K>
void forward(const Shape &s, const Input<T> &input, const T *const *wd, const T *const *wp, T *y,
             T *moments) {
  const Kernels<T> kernels(s, wd, wp);
  const long lanes = kernels.lanes, reach = s.reach();
  const long rows = s.out(s.height), cols = s.out(s.width);
  const long row = (s.width + 2 * reach + s.stride) * lanes;
  const long fits = BAND_BYTES / (row * long(sizeof(T))) - 2 * reach;
  const long band = std::min(rows, std::max(1L, fits / s.stride));
  const long bands = (rows + band - 1) / band, wide = s.operations * lanes;
  Sums<double> sums(2 * wide);
#pragma omp parallel num_threads(sums.threads)
  {
    static thread_local Scratch<T> input_memory, line_memory;
    const long lines = lines_of(cols);
    T *line = line_memory.get(2 * lines * cols * lanes), *result = line + lines * cols * lanes;
    // Without padding, results are written where they belong.
    const bool whole = s.channels == lanes;
    Moments<T> own{sums.own(), sums.own() + wide};
#pragma omp for schedule(static) collapse(2)
    for (long n = 0; n < s.n; n++)
      for (long b = 0; b < bands; b++) {
        const long first = b * band, last = std::min(rows, first + band);
        const long count = (last - first - 1) * s.stride + 2 * reach + 1;
        Rows<T> in{nullptr, first * s.stride - reach, count, row, lanes, reach};
        in.data = input_memory.get(in.size());
        for (long e = 0; e < s.operations; e++) {
          if (e == 0 || !s.shared) in.rectify(input, n, e);
          for (long oy = first; oy < last; oy += lines) {
            const long pixels = std::min(lines, last - oy) * cols;
            for (long x = 0; x < pixels; x += cols)
              depthwise_row<T, K, K, false>(
                  line + x * lanes, 1, in.at_row((oy + x / cols) * s.stride - reach), row,
                  kernels.depthwise + e * kernels.taps * lanes, cols, s.stride, s.dilation, lanes);
            T *to = y + ((n * rows + oy) * cols) * s.written() + e * s.channels;
            T *found = whole ? to : result;
            const long apart = whole ? s.written() : lanes;
            pointwise_row(found, apart, line, lanes, kernels.transposed + e * s.channels * lanes,
                          pixels, s.channels, lanes);
            by_channel<T>(s.channels, [&]<long N>(long c) {
              if (!whole)
                for (long x = 0; x < pixels; x++)
                  into<N>(to + x * s.written() + c) = as<N>(result + x * lanes + c);
              if (moments) own.template add<N>(found + c, apart, pixels, e * lanes + c);
            });
          }
        }
      }
  }
  if (!moments) return;
  double *total = sums.total();
  for (long e = 0; e < s.operations; e++, total += lanes) {
    T *mean = moments + e * s.channels;
    Moments<T>{total, total + wide}.write(s.channels, s.n * rows * cols, mean, mean + s.written());
  }
}

// Gradients for what is read and for the kernels, those that are not null.
//
// Without a norm before, the gradient for x is written to gx, or added. With one, gx is written,
// the gradient for the norm's result, and its Σ gx and Σ gx · (x − mean) are gx_sums, one after the
// other.
template <class T, int K>
void backward(const Shape &s, const Input<T> &input, const T *mean, const T *const *wd,
              const T *const *wp, const Gradient<T> &given, T *gx, bool adds, double *gx_sums,
              T *const *gwd, T *const *gwp) {
  const Kernels<T> kernels(s, wd, wp);
  const long lanes = kernels.lanes, taps = kernels.taps, reach = s.reach();
  const long rows = s.out(s.height), cols = s.out(s.width);
  // Results within `halo` of a band's own reach its pixels.
  const long halo = (reach + s.stride - 1) / s.stride;
  const long row = (s.width + 2 * reach + s.stride) * lanes;
  const long fits = BAND_BYTES / ((s.operations + 1) * row * long(sizeof(T))) - 2 * reach;
  const long band = std::min(rows, std::max(2L, fits / s.stride));
  const long bands = (rows + band - 1) / band;
  const long d = s.operations * taps * lanes, p = s.operations * s.channels * lanes;
  const long wide = s.operations * lanes;
  Sums<T> kernel_sums(d + p);
  Sums<double, 1> norm_sums(2 * wide);
#pragma omp parallel num_threads(kernel_sums.threads)
  {
    static thread_local Scratch<T> input_memory, output_memory, line_memory;
    const long lines = lines_of(cols);
    T *line = line_memory.get(((2 * lines + 1) * cols + s.width) * lanes);
    T *gradient = line + lines * cols * lanes, *spread = gradient + lines * cols * lanes;
    T *total = spread + cols * lanes;
    T *sum_d = kernel_sums.own(), *sum_p = sum_d + d;
    double *sum_x = norm_sums.own();
    std::fill(gradient, gradient + lines * cols * lanes, T(0));
#pragma omp for schedule(static) collapse(2)
    for (long n = 0; n < s.n; n++)
      for (long b = 0; b < bands; b++) {
        const long first = b * band, last = std::min(rows, first + band);
        const long top = first * s.stride, bottom = std::min(s.height, last * s.stride);
        const long count = (last - first - 1) * s.stride + 2 * reach + 1;
        Rows<T> in{nullptr, top - reach, count, row, lanes, reach};
        // ∂/∂(depthwise result) of each operation.
        const long line_size = (cols + 2 * halo) * lanes;
        Rows<T> out{nullptr, first - halo, last - first + 2 * halo, line_size, lanes, halo};
        in.data = input_memory.get(in.size());
        T *planes = output_memory.get(s.operations * out.size());
        const long from = gx ? std::max(0L, first - halo) : first;
        const long until = gx ? std::min(rows, last + halo) : last;
        for (long e = 0; e < s.operations; e++) {
          const long at_d = e * taps * lanes, at_p = e * s.channels * lanes;
          out.data = planes + e * out.size();
          if (gx) out.surround(rows, cols);
          if (gwd && (e == 0 || !s.shared)) in.rectify(input, n, e);
          for (long start = from; start < until; start += lines) {
            const long end = std::min(until, start + lines), pixels = (end - start) * cols;
            given.copy(gradient, lanes, (n * rows + start) * cols, pixels, e, e * s.channels, 0,
                       s.channels);
            long own = 0; // pixels of the band itself
            for (long oy = start; oy < end; oy++) {
              const T *gradient_row = gradient + (oy - start) * cols * lanes;
              T *to = gx ? out.at_row(oy) + halo * lanes : spread;
              pointwise_row(to, lanes, gradient_row, lanes, kernels.pointwise + at_p, cols,
                            s.channels, lanes);
              if (!gwd || oy < first || oy >= last) continue;
              const T *window = in.at_row(oy * s.stride - reach);
              depthwise_row<T, K, K, false>(line + own * lanes, 1, window, row,
                                            kernels.depthwise + at_d, cols, s.stride, s.dilation,
                                            lanes);
              add_taps<T, K>(sum_d + at_d, window, row, to, cols, s.stride, s.dilation, lanes);
              own += cols;
            }
            if (own)
              add_outer(sum_p + at_p, line, lanes,
                        gradient + (std::max(first, start) - start) * cols * lanes, own, s.channels,
                        lanes);
          }
        }
        if (!gx) continue;
        for (long iy = top; iy < bottom; iy++)
          for (long e = 0; e < s.operations; e++) {
            out.data = planes + e * out.size();
            const T *weight = kernels.reversed + e * taps * lanes;
            // Columns that meet the taps b, b + stride, … of the lines a, a + stride, ….
            auto spread_row = [&]<int A, int B, bool ADD>(long a, long b) {
              const long column = (s.stride - reach % s.stride + b) % s.stride;
              const long y = (iy + reach - a) / s.stride - (A - 1) * s.dilation;
              const long x = (column + reach - b) / s.stride - (B - 1) * s.dilation;
              const long met = (s.width - column + s.stride - 1) / s.stride;
              depthwise_row<T, A, B, ADD>(total + column * lanes, s.stride,
                                          out.at_row(y) + (halo + x) * lanes, out.row, weight, met,
                                          1, s.dilation, lanes);
            };
            auto spread_rows = [&]<bool ADD>() {
              constexpr int MORE = (K + 1) / 2, LESS = K / 2;
              const long a = (iy + reach) % s.stride;
              if (s.stride == 1) {
                spread_row.template operator()<K, K, ADD>(0, 0);
              } else if (a == 0) {
                spread_row.template operator()<MORE, MORE, ADD>(0, 0);
                weight += MORE * MORE * lanes;
                spread_row.template operator()<MORE, LESS, ADD>(0, 1);
              } else {
                weight += MORE * K * lanes;
                spread_row.template operator()<LESS, MORE, ADD>(1, 0);
                weight += LESS * MORE * lanes;
                spread_row.template operator()<LESS, LESS, ADD>(1, 1);
              }
            };
            if (e == 0 || !s.shared)
              spread_rows.template operator()<false>();
            else
              spread_rows.template operator()<true>();
            if (s.shared && e + 1 < s.operations) continue;
            const long block = s.block(e);
            by_channel<T>(s.channels, [&]<long N>(long c) {
              const auto affine = input.template affine<N>(block + c);
              const long start = input.index(n, iy, 0) + block + c, distance = input.distance();
              auto masked = [&](long x, P<T, N> before) {
                const P<T, N> value = as<N>(total + x * lanes + c);
                return P<T, N>(affine(before) <= 0 ? P<T, N>{} : value);
              };
              if (!mean) {
                for (long x = 0; x < s.width; x++) {
                  const long at = start + x * distance;
                  fetch<true>(gx + at + s.image_width * distance, 1);
                  const P<T, N> value = masked(x, as<N>(input.x + at));
                  into<N>(gx + at) = adds ? as<N>(gx + at) + value : value;
                }
                return;
              }
              const P<T, N> centre = as<N>(mean + block + c);
              double *sum = sum_x + e * lanes + c;
              pair_sums<T, N>(s.width, [&](long x) {
                const long at = start + x * distance;
                const P<T, N> before = as<N>(input.x + at), value = masked(x, before);
                into<N>(gx + at) = value;
                fetch<true>(gx + at + s.image_width * distance, 1);
                return Pair<T, N>{value, value * (before - centre)};
              }).add_to(sum, sum + wide);
            });
          }
      }
  }
  if (gx && mean) {
    const double *sum = norm_sums.total();
    for (long i = 0; i < 2 * s.operations; i++)
      std::copy_n(sum + i * lanes, s.channels, gx_sums + i * s.channels);
  }
  if (!gwd) return;
  const T *sum = kernel_sums.total();
  for (long e = 0; e < s.operations; e++)
    for (long c = 0; c < s.channels; c++) {
      for (long t = 0; t < taps; t++)
        gwd[e][c * taps + t] = sum[(e * taps + t) * lanes + c];
      for (long i = 0; i < s.channels; i++)
        gwp[e][c * s.channels + i] = sum[d + (e * s.channels + i) * lanes + c];
    }
}

// Passes over all pixels are taken in blocks of rows that stay in cache.
constexpr long ROWS = 512;

// Calls body(first, last) for every block, on all cores.
template <long BLOCK = ROWS, class Body> void by_block(long rows, Body body) {
#pragma omp parallel for schedule(static)
  for (long first = 0; first < rows; first += BLOCK) body(first, std::min(rows, first + BLOCK));
}

// Calls visit<N>(to, from, height, width) for every 3×3 window of C channels, padded by 1: `to` is
// where its result belongs, `from` its first value within the image, of height × width pixels.
template <class T, class Visit> void by_window(const Shape &s, Visit visit) {
  const long rows = s.out(s.height), cols = s.out(s.width);
#pragma omp parallel for schedule(static)
  for (long n = 0; n < s.n; n++)
    for (long oy = 0; oy < rows; oy++)
      for (long ox = 0; ox < cols; ox++) {
        const long y = oy * s.stride - 1, x = ox * s.stride - 1;
        const long top = std::max(0L, y), bottom = std::min(s.height, y + 3);
        const long left = std::max(0L, x), right = std::min(s.width, x + 3);
        const long start = ((n * s.height + top) * s.width + left) * s.channels;
        by_channel<T>(s.channels, [&]<long N>(long c) {
          visit.template operator()<N>(((n * rows + oy) * cols + ox) * s.channels + c, start + c,
                                       bottom - top, right - left);
        });
      }
}

// Mean and biased variance of each channel, one after the other.
template <class T> void find_moments(long rows, long channels, const T *x, T *moments) {
  Sums<double> sums(2 * channels);
  by_block(rows, [&](long first, long last) {
    Moments<T> own{sums.own(), sums.own() + channels};
    by_channel<T>(channels, [&]<long N>(long c) {
      own.template add<N>(x + first * channels + c, channels, last - first, c);
    });
  });
  double *total = sums.total();
  Moments<T>{total, total + channels}.write(channels, rows, moments, moments + channels);
}

// 3×3 pooling: the largest value, or the mean of those within the image; and mean and biased
// variance of each channel of the result, one after the other, unless null.
template <class T> void pool(const Shape &s, long largest, const T *x, T *y, T *of_y) {
  const long line = s.width * s.channels;
  by_window<T>(s, [&]<long N>(long to, long from, long height, long width) {
    P<T, N> value = as<N>(x + from), sum = {};
    for (long i = 0; i < height; i++)
      for (long j = 0; j < width; j++) {
        const P<T, N> next = as<N>(x + from + i * line + j * s.channels);
        // Whoever has met a value that is no number keeps it.
        value = ((next > value) | (next != next)) ? next : value;
        sum += next;
      }
    into<N>(y + to) = largest ? value : sum / T(height * width);
  });
  if (of_y) find_moments(s.n * s.out(s.height) * s.out(s.width), s.channels, y, of_y);
}

// Adds to gx the gradient for x; of equal values the first is the largest.
template <class T>
void pool_backward(const Shape &s, long largest, const T *x, const T *y, const T *g, T *gx) {
  const long line = s.width * s.channels;
  by_window<T>(s, [&]<long N>(long to, long from, long height, long width) {
    P<T, N> given = as<N>(g + to);
    const P<T, N> value = as<N>(y + to);
    if (!largest) given /= T(height * width);
    for (long i = 0; i < height; i++)
      for (long j = 0; j < width; j++) {
        const long at = from + i * line + j * s.channels;
        if (!largest) {
          into<N>(gx + at) += given;
          continue;
        }
        const auto found = as<N>(x + at) == value;
        into<N>(gx + at) += found ? given : P<T, N>{};
        given = found ? P<T, N>{} : given;
      }
  });
}

// Running statistics of a batch norm, and the moments of a batch of so many pixels.
template <class T> struct Record {
  double momentum;
  T *running_mean, *running_var;
  long *batches; // how many there were
  const T *mean, *var;
  long channels, pixels;
};

// running += momentum · (found − running), of mean and unbiased variance.
template <class T> void record(const Record<T> *records, long count) {
  for (long i = 0; i < count; i++) {
    const Record<T> &r = records[i];
    ++*r.batches;
    const double unbiased = double(r.pixels) / (r.pixels - 1);
    for (long c = 0; c < r.channels; c++) {
      r.running_mean[c] += T(r.momentum * (r.mean[c] - r.running_mean[c]));
      r.running_var[c] += T(r.momentum * (unbiased * r.var[c] - r.running_var[c]));
    }
  }
}

// Of a sum: a result x, every `width` values a pixel, and the batch norm behind it.
template <class T> struct Term {
  const T *x;
  Norm<T> norm;
  long width;
};

// to = from + Σ_i norm_i(x_i) over `count` terms; from may be null.
template <class T>
void weighted_sum(const Term<T> *terms, long count, long channels, long rows, const T *from, T *to) {
  std::vector<T> factors(count * channels), constants(channels), offset(channels);
  for (long i = 0; i < count; i++) {
    terms[i].norm.write(channels, factors.data() + i * channels, offset.data());
    for (long c = 0; c < channels; c++) constants[c] += offset[c];
  }
  by_block(rows, [&](long first, long last) {
    by_channel<T>(channels, [&]<long N>(long c) {
      const P<T, N> constant = as<N>(constants.data() + c);
      for (long r = first; r < last; r++)
        into<N>(to + r * channels + c) =
            from ? as<N>(from + r * channels + c) + constant : constant;
      // Several at a time, so that the sum is read and written less often.
      auto add = [&]<long TERMS>(long start) {
        P<T, N> factor[TERMS];
        const T *x[TERMS];
        long width[TERMS];
        for (long i = 0; i < TERMS; i++) {
          factor[i] = as<N>(factors.data() + (start + i) * channels + c);
          x[i] = terms[start + i].x + c, width[i] = terms[start + i].width;
        }
        for (long r = first; r < last; r++) {
          P<T, N> total = as<N>(to + r * channels + c);
          for (long i = 0; i < TERMS; i++) total += factor[i] * as<N>(x[i] + r * width[i]);
          into<N>(to + r * channels + c) = total;
        }
      };
      long i = 0;
      for (; i + 4 <= count; i += 4) add.template operator()<4>(i);
      if (i + 2 <= count) add.template operator()<2>(i), i += 2;
      if (i < count) add.template operator()<1>(i);
    });
  });
}

// What is found for the norms of a sum's terms, from the gradient g for the sum.
template <class T>
void weighted_sum_backward(const Term<T> *terms, const NormGradient<T> *found, long count, long channels, long rows,
                  const T *g) {
  Sums<double> all(2 * count * channels);
  by_block(rows, [&](long first, long last) {
    double *sums = all.own();
    by_channel<T>(channels, [&]<long N>(long c) {
      const T *given = g + first * channels + c;
      for (long i = 0; i < count; i++) {
        const Norm<T> &norm = terms[i].norm;
        if (norm.fixed && !found[i].of_weight && !found[i].of_scale) continue;
        const long width = terms[i].width;
        const T *x = terms[i].x + first * width + c;
        const P<T, N> centre = norm.mean ? as<N>(norm.mean + c) : P<T, N>{};
        double *to = sums + i * channels + c;
        pair_sums<T, N>(last - first, [&](long r) {
          const P<T, N> value = as<N>(given + r * channels);
          return Pair<T, N>{value, value * (as<N>(x + r * width) - centre)};
        }).add_to(to, to + count * channels);
      }
    });
  });
  const double *sums = all.total();
  for (long i = 0; i < count; i++, sums += channels)
    terms[i].norm.differentiate(channels, rows, sums, sums + count * channels, found[i]);
}

// Writes, or adds to gx, the gradient for y behind the norms of several edges, C channels each: of
// a block of y each, or of all y.
template <class T>
void norm_backward(long rows, long edges, long channels, const Gradient<T> &given, bool adds,
                   T *gx) {
  const long width = given.width, copies = edges * channels / width;
  by_block(rows, [&](long first, long last) {
    for (long e = 0; e < edges; e += copies)
      by_channel<T>(channels, [&]<long N>(long c) {
        const long block = copies == 1 ? e * channels : 0;
        for (long r = first; r < last; r++) {
          P<T, N> sum = given.template read<N>(r, e, block, c);
          for (long i = e + 1; i < e + copies; i++)
            sum += as<N>(given.factors + i * channels + c) *
                   as<N>(given.given[i] + r * given.stride + c);
          T *to = gx + r * width + block + c;
          into<N>(to) = adds ? as<N>(to) + sum : sum;
        }
      });
  });
}

// E pointwise convolutions of relu(x), whose R channels are those of `sources` tensors, one after
// the other: at stride 1 of all pixels. At stride 2 the first half of the channels of each comes
// from the even pixels, the other from those diagonally after them, zeros beyond the border: two
// grids, each with its own half of the weights, (channels, 2 R), of which the others are not read.
struct Projection {
  Shape s; // channels: of one source
  long sources;
  long channels; // of the result

  long read() const { return sources * s.channels; }
  long rows() const { return s.n * s.out(s.height) * s.out(s.width); }
  long of_each() const { return channels / s.operations; }
  long first(long grid) const { return grid * (of_each() / 2); }
  long count(long grid) const {
    return s.stride == 1 ? of_each() : grid == 0 ? of_each() / 2 : of_each() - of_each() / 2;
  }
  long written(long grid) const { return s.operations * count(grid); }
  // Calls visit(channel of the result, position among those of the grid).
  template <class Visit> void by_result(long grid, Visit visit) const {
    for (long e = 0; e < s.operations; e++)
      for (long c = 0; c < count(grid); c++)
        visit(e * of_each() + first(grid) + c, e * count(grid) + c);
  }
  const auto *weights(const auto *weight, long channel, long grid) const {
    return weight + (channel * s.stride + grid) * read();
  }
  // The pixel of x that row r of the result reads with offset (down, right), or −1.
  long pixel(long r, long down, long right) const {
    if (s.stride == 1) return r;
    const long cols = s.out(s.width), lines = s.out(s.height);
    const long y = r / cols % lines * 2 + down, x = r % cols * 2 + right;
    return y < s.height && x < s.width ? (r / (cols * lines) * s.height + y) * s.width + x : -1;
  }
};

// Rows that are worked on together.
constexpr long PIXELS = 128;

// The pixels of x that some rows of the result read with an offset, and their rectified channels.
template <class T> struct Block {
  const Projection &p;
  T *input; // `lanes` values of each
  const long lanes;
  long count = 0, pixels[PIXELS] = {};

  void find(long *to, long first, long last, long down, long right) {
    for (long r = first; r < last; r++) to[r - first] = p.pixel(r, down, right);
  }
  void rectify(const T *const *x, long first, long last, long grid) {
    find(pixels, first, last, grid, grid);
    count = last - first;
    const long channels = p.s.channels, ahead = PIXELS * p.s.stride * p.s.stride * channels;
    for (long i = 0; i < p.sources; i++)
      by_channel<T>(channels, [&]<long N>(long c) {
        T *to = input + i * channels + c;
        for (long r = 0; r < count; r++) {
          const T *from = x[i] + pixels[r] * channels + c;
          fetch(from + ahead, 1);
          const P<T, N> value = pixels[r] < 0 ? P<T, N>{} : as<N>(from);
          into<N>(to + r * lanes) = value < 0 ? P<T, N>{} : value;
        }
      });
  }
  // Writes, or adds, to gx, where x > 0, what is given for each pixel; writes zeros elsewhere.
  void spread(const T *given, T *gx, bool adds, long source, long first, long last, long grid) {
    const long channels = p.s.channels, ahead = PIXELS * p.s.stride * p.s.stride * channels;
    if (p.s.stride == 2 && !adds) {
      long others[PIXELS];
      find(others, first, last, grid, 1 - grid);
      for (long r = 0; r < count; r++)
        if (others[r] >= 0) std::fill_n(gx + others[r] * channels, channels, T(0));
    }
    by_channel<T>(channels, [&]<long N>(long c) {
      const long start = source * channels + c;
      for (long r = 0; r < count; r++) {
        if (pixels[r] < 0) continue;
        T *to = gx + pixels[r] * channels + c;
        fetch<true>(to + ahead, 1);
        const P<T, N> own = as<N>(given + r * lanes + start);
        const P<T, N> value = as<N>(input + r * lanes + start) <= 0 ? P<T, N>{} : own;
        into<N>(to) = adds ? as<N>(to) + value : value;
      }
    });
  }
};

// y, and the mean and biased variance of each of its channels, one after the other, unless null.
template <class T>
void project(const Projection &p, const T *const *x, const T *weight, T *y, T *of_y) {
  const long rows = p.rows(), read = p.read(), channels = p.channels;
  const long lanes = padded(channels, LANES<T>), inner = padded(read, LANES<T>);
  static thread_local Scratch<T> memory;
  T *matrices = memory.get(p.s.stride * read * lanes);
  for (long g = 0; g < p.s.stride; g++)
    p.by_result(g, [&](long channel, long position) {
      T *matrix = matrices + g * read * lanes + position;
      const T *own = p.weights(weight, channel, g);
      for (long i = 0; i < read; i++) matrix[i * padded(p.written(g), LANES<T>)] = own[i];
    });
  Sums<double> sums(2 * channels);
  by_block<PIXELS>(rows, [&](long first, long last) {
    static thread_local Scratch<T> own_memory;
    Block<T> block{p, own_memory.get(PIXELS * (inner + lanes)), inner};
    T *result = block.input + PIXELS * inner;
    Moments<T> own{sums.own(), sums.own() + channels};
    for (long g = 0; g < p.s.stride; g++) {
      const long own_lanes = padded(p.written(g), LANES<T>);
      block.rectify(x, first, last, g);
      pointwise_row(result, own_lanes, block.input, inner, matrices + g * read * lanes, last - first,
                    read, own_lanes);
      for (long e = 0; e < p.s.operations; e++)
        by_channel<T>(p.count(g), [&]<long N>(long c) {
          const long to = e * p.of_each() + p.first(g) + c;
          const T *from = result + e * p.count(g) + c;
          for (long r = first; r < last; r++)
            into<N>(y + r * channels + to) = as<N>(from + (r - first) * own_lanes);
          if (of_y) own.template add<N>(from, own_lanes, last - first, to);
        });
    }
  });
  if (!of_y) return;
  double *total = sums.total();
  Moments<T>{total, total + channels}.write(channels, rows, of_y, of_y + channels);
}

// Gradients for the tensors that x consists of, which are written or added, and for the weight:
// those that are not null.
template <class T>
void project_backward(const Projection &p, const T *const *x, const T *weight,
                      const Gradient<T> &given, T *const *gx, const long *adds, T *gweight) {
  const Shape &s = p.s;
  const long read = p.read(), channels = p.channels;
  const long lanes = padded(channels, LANES<T>), inner = padded(read, LANES<T>);
  static thread_local Scratch<T> memory;
  T *matrices = memory.get(s.stride * channels * inner);
  for (long g = 0; g < s.stride; g++)
    p.by_result(g, [&](long channel, long position) {
      T *row = matrices + (g * channels + position) * inner;
      std::copy_n(p.weights(weight, channel, g), read, row);
    });
  Sums<T> sums(s.stride * channels * inner);
  by_block<PIXELS>(p.rows(), [&](long first, long last) {
    static thread_local Scratch<T> own_memory;
    Block<T> block{p, own_memory.get(PIXELS * (2 * inner + lanes)), inner};
    T *spread = block.input + PIXELS * inner, *gradient = spread + PIXELS * inner;
    for (long g = 0; g < s.stride; g++) {
      const long written = p.written(g), own_lanes = padded(written, LANES<T>);
      for (long e = 0; e < s.operations; e++)
        given.copy(gradient + e * p.count(g), own_lanes, first, last - first, e,
                   e * p.of_each() + p.first(g), p.first(g), p.count(g));
      block.rectify(x, first, last, g);
      if (gweight)
        add_outer(sums.own() + g * channels * inner, gradient, own_lanes, block.input, last - first,
                  written, inner);
      if (std::none_of(gx, gx + p.sources, [](T *own) { return own; })) continue;
      pointwise_row(spread, inner, gradient, own_lanes, matrices + g * channels * inner,
                    last - first, written, inner);
      for (long i = 0; i < p.sources; i++)
        if (gx[i]) block.spread(spread, gx[i], adds[i], i, first, last, g);
    }
  });
  if (!gweight) return;
  std::fill_n(gweight, channels * s.stride * read, T(0));
  const T *total = sums.total();
  for (long g = 0; g < s.stride; g++)
    p.by_result(g, [&](long channel, long position) {
      const T *own = total + (g * channels + position) * inner;
      std::copy_n(own, read, gweight + (channel * s.stride + g) * read);
    });
}

template <class T>
void convolve(const Shape &s, const T *x, const Norm<T> &before, const T *const *wd,
              const T *const *wp, T *y, T *moments) {
  const Input<T> input(x, s, before);
  s.kernel == 3 ? forward<T, 3>(s, input, wd, wp, y, moments)
                : forward<T, 5>(s, input, wd, wp, y, moments);
}

// found: for the norm before, if there is one.
template <class T>
void convolve_backward(const Shape &s, const T *x, const Norm<T> &before, const T *const *wd,
                       const T *const *wp, const Gradient<T> &given, T *gx, bool adds,
                       const NormGradient<T> *found, T *const *gwd, T *const *gwp) {
  const Input<T> input(x, s, before);
  const T *mean = found ? before.mean : nullptr;
  const long width = s.read();
  std::vector<double> sums(2 * width);
  s.kernel == 3 ? backward<T, 3>(s, input, mean, wd, wp, given, gx, adds, sums.data(), gwd, gwp)
                : backward<T, 5>(s, input, mean, wd, wp, given, gx, adds, sums.data(), gwd, gwp);
  if (found)
    before.differentiate(width, s.n * s.height * s.width, sums.data(), sums.data() + width, *found);
}

template <class T> void clear(T *to, long count) {
  by_block<1 << 14>(count, [&](long first, long last) { std::fill(to + first, to + last, T(0)); });
}

// `count` arrays of `size` values, one after the other.
template <class T> void join(const T *const *from, long count, long size, T *to) {
  for (long i = 0; i < count; i++) std::copy_n(from[i], size, to + i * size);
}

// An argument, or a field of a structure or an array that an argument points to.
union __attribute__((may_alias)) Word {
  long number;
  char *address;
};

template <class A> decltype(auto) argument(const Word &word) {
  if constexpr (std::is_reference_v<A>)
    return *reinterpret_cast<std::remove_reference_t<A> *>(word.address);
  else if constexpr (std::is_pointer_v<A>)
    return reinterpret_cast<A>(word.address);
  else {
    static_assert(std::is_integral_v<A>, "real numbers are passed within structures");
    return A(word.number);
  }
}

// Calls a kernel with the words that follow each other.
template <class... A> void call(void (*kernel)(A...), const Word *words) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    kernel(argument<A>(words[I])...);
  }(std::index_sequence_for<A...>{});
}

struct Call {
  void (*kernel)(const Word *);
  long first; // of its words
};

// A word that says how many bytes from the start of a tensor, the first of which are the words.
struct Address {
  long word, tensor;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

// Makes the calls, one after the other, and writes how long each takes, unless that is null. The
// OpenMP runtime may be another than PyTorch's, so it is told the number of threads.
extern "C" void run(const Call *calls, long count, const Word *words, long size,
                    const Address *addresses, long number, char **tensors, double *seconds,
                    int threads) {
  omp_set_num_threads(threads);
  static thread_local std::vector<Word> own;
  own.assign(words, words + size);
  tensors[0] = reinterpret_cast<char *>(own.data());
  for (long i = 0; i < number; i++)
    own[addresses[i].word].address = tensors[addresses[i].tensor] + own[addresses[i].word].number;
  for (long i = 0; i < count; i++) {
    const double began = seconds ? now() : 0;
    calls[i].kernel(own.data() + calls[i].first);
    if (seconds) seconds[i] = now() - began;
  }
}

#define KERNEL(name, T)                                                                            \
  extern "C" void name##_##T(const Word *words) { call(name<T>, words); }
#define KERNELS(name) KERNEL(name, float) KERNEL(name, double)

KERNELS(convolve)
KERNELS(convolve_backward)
KERNELS(project)
KERNELS(project_backward)
KERNELS(pool)
KERNELS(pool_backward)
KERNELS(find_moments)
KERNELS(record)
KERNELS(weighted_sum)
KERNELS(weighted_sum_backward)
KERNELS(norm_backward)
KERNELS(clear)
KERNELS(join)
