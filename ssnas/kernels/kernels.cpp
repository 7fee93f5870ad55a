// Depthwise separable convolutions and normalised sums, on channels-last images.
//
// Separable convolutions: E operations have C channels each: a rectified input, a depthwise k×k kernel and a pointwise C×C
// kernel. Work is divided into bands of rows of one image, small enough that a band, the depthwise
// result and its gradient stay in a core's cache: none of them is ever written to main memory.
// In a band, channels are padded to whole vectors and borders are zeros, so the inner loops have
// no conditions.

#include <algorithm>
#include <array>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <vector>

namespace {

struct Shape {
  // E operations of C channels; whether all read the same C channels, or each its own block. Of the
  // image, height × width pixels are read: every one, or every second of every second row (step 2).
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

// A buffer of vectors that outlives the call: allocating it anew would cost page faults.
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

// to[x] (+)= Σ_taps from[row + dilation·ky][stride·x + dilation·kx] · weight[tap], vector by vector.
template <class T, int K, bool ADD>
void depthwise_row(T *to, const T *from, long row, const T *weight, long width, long stride,
                   long dilation, long lanes) {
  constexpr int BLOCK = 6;
  for (long v = 0; v < lanes; v += LANES<T>) {
    long x = 0;
    auto block = [&]<int B>() {
      V<T> sum[B];
      for (int b = 0; b < B; b++) sum[b] = ADD ? load(to + (x + b) * lanes + v) : V<T>{};
      for (int ky = 0; ky < K; ky++)
        for (int kx = 0; kx < K; kx++) {
          const V<T> w = load(weight + (ky * K + kx) * lanes + v);
          const T *start = from + ky * dilation * row + (x * stride + kx * dilation) * lanes + v;
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) sum[b] += load(start + b * stride * lanes) * w;
        }
      for (int b = 0; b < B; b++) at(to + (x + b) * lanes + v) = sum[b];
      x += B;
    };
    while (x + BLOCK <= width) block.template operator()<BLOCK>();
    while (x < width) block.template operator()<1>();
  }
}

// to[x][·] = Σ_c from[x][c] · matrix[c][·].
template <class T>
void pointwise_row(T *to, const T *from, const T *matrix, long width, long channels, long lanes) {
  long v = 0, x = 0;
  auto block = [&]<int B, int N>() {
    V<T> sum[B][N] = {};
    for (long c = 0; c < channels; c++) {
      V<T> w[N];
      for (int n = 0; n < N; n++) w[n] = load(matrix + c * lanes + v + n * LANES<T>);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const T value = from[(x + b) * lanes + c];
        for (int n = 0; n < N; n++) sum[b][n] += value * w[n];
      }
    }
    for (int b = 0; b < B; b++)
      for (int n = 0; n < N; n++) at(to + (x + b) * lanes + v + n * LANES<T>) = sum[b][n];
    x += B;
  };
  auto columns = [&]<int B, int N>() {
    for (x = 0; x + B <= width;) block.template operator()<B, N>();
    while (x < width) block.template operator()<1, N>();
    v += N * LANES<T>;
  };
  while (v + 4 * LANES<T> <= lanes) columns.template operator()<4, 4>();
  while (v + 2 * LANES<T> <= lanes) columns.template operator()<6, 2>();
  while (v < lanes) columns.template operator()<8, 1>();
}

// sum[a][·] += Σ_x left[x][a] · right[x][·].
template <class T>
void add_outer(T *sum, const T *left, const T *right, long width, long channels, long lanes) {
  for (long v = 0; v < lanes; v += LANES<T>) {
    auto block = [&]<int B>(long a) {
      V<T> part[B];
      for (int b = 0; b < B; b++) part[b] = load(sum + (a + b) * lanes + v);
      for (long x = 0; x < width; x++) {
        const V<T> r = load(right + x * lanes + v);
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) part[b] += left[x * lanes + a + b] * r;
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
  for (long v = 0; v < lanes; v += LANES<T>)
    for (int ky = 0; ky < K; ky++) {
      V<T> part[K];
      for (int kx = 0; kx < K; kx++) part[kx] = load(sum + (ky * K + kx) * lanes + v);
      const T *line = from + ky * dilation * row + v;
      for (long x = 0; x < width; x++) {
        const V<T> g = load(gradient + x * lanes + v);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++) part[kx] += load(line + (x * stride + kx * dilation) * lanes) * g;
      }
      for (int kx = 0; kx < K; kx++) at(sum + (ky * K + kx) * lanes + v) = part[kx];
    }
}

// The kernels of every operation, laid out for the loops above.
template <class T> struct Kernels {
  std::vector<T> memory;
  T *depthwise, *flipped, *pointwise, *transposed;
  long lanes, taps;

  Kernels(const Shape &s, const T *wd, const T *wp)
      : lanes(padded(s.channels, LANES<T>)), taps(s.kernel * s.kernel) {
    const long d = s.operations * taps * lanes, p = s.operations * s.channels * lanes;
    memory.assign(2 * (d + p) + LANES<T>, 0);
    auto address = reinterpret_cast<size_t>(memory.data());
    depthwise = reinterpret_cast<T *>((address + 63) / 64 * 64);
    flipped = depthwise + d, pointwise = flipped + d, transposed = pointwise + p;
    for (long e = 0; e < s.operations; e++)
      for (long c = 0; c < s.channels; c++) {
        for (long t = 0; t < taps; t++) {
          const T value = wd[(e * s.channels + c) * taps + t];
          depthwise[(e * taps + t) * lanes + c] = value;
          flipped[(e * taps + taps - 1 - t) * lanes + c] = value;
        }
        for (long i = 0; i < s.channels; i++) {
          const T value = wp[(e * s.channels + c) * s.channels + i];
          pointwise[(e * s.channels + c) * lanes + i] = value;
          transposed[(e * s.channels + i) * lanes + c] = value;
        }
      }
  }
};

// What the operations read: relu(factor · x + offset) by channel, or relu(x) without factors.
template <class T> struct Input {
  const T *x, *factor, *offset;
  const Shape &shape;

  long index(long n, long row, long column) const {
    const long line = n * shape.image_height + row * shape.step;
    return (line * shape.image_width + column * shape.step) * shape.read();
  }
  // to[c] = factor · x + offset, of the pixel at `at` and the block of channels from `block` on.
  void read(T *to, long at, long block) const {
    const T *from = x + at + block;
    if (!factor)
      std::copy(from, from + shape.channels, to);
    else
      for (long c = 0; c < shape.channels; c++) to[c] = factor[block + c] * from[c] + offset[block + c];
  }
};

// Rows of an image with zeros around it: rows [first, first + count), columns from −reach on.
template <class T> struct Rows {
  T *data;
  long first, count, row, lanes, reach;

  long size() const { return count * row; }
  T *at_row(long y) const { return data + (y - first) * row; }

  // Rectified channels of the block of one operation, of image n.
  void rectify(const Input<T> &input, long n, long operation) {
    const Shape &s = input.shape;
    const long block = s.block(operation);
    std::fill(data, data + size(), T(0));
    for (long y = std::max(first, 0L); y < std::min(first + count, s.height); y++) {
      T *to = at_row(y) + reach * lanes;
      for (long i = 0; i < s.width; i++, to += lanes) {
        input.read(to, input.index(n, y, i), block);
        for (long c = 0; c < s.channels; c++) to[c] = to[c] < 0 ? T(0) : to[c];
      }
    }
  }
};

template <class T>
void copy_pixels(T *to, long to_stride, const T *from, long from_stride, long width, long channels) {
  for (long x = 0; x < width; x++, to += to_stride, from += from_stride)
    std::memcpy(to, from, channels * sizeof(T));
}

template <class T, int K>
void forward(const Shape &s, const Input<T> &input, const T *wd, const T *wp, T *y) {
  const Kernels<T> kernels(s, wd, wp);
  const long lanes = kernels.lanes, reach = s.reach(), rows = s.out(s.height), cols = s.out(s.width);
  const long row = (s.width + 2 * reach + s.stride) * lanes;
  const long fits = BAND_BYTES / (row * long(sizeof(T))) - 2 * reach;
  const long band = std::min(rows, std::max(1L, fits / s.stride));
  const long bands = (rows + band - 1) / band;
#pragma omp parallel
  {
    static thread_local Scratch<T> input_memory, line_memory;
    T *line = line_memory.get(2 * cols * lanes), *result = line + cols * lanes;
#pragma omp for schedule(static) collapse(2)
    for (long n = 0; n < s.n; n++)
      for (long b = 0; b < bands; b++) {
        const long first = b * band, last = std::min(rows, first + band);
        const long count = (last - first - 1) * s.stride + 2 * reach + 1;
        Rows<T> in{nullptr, first * s.stride - reach, count, row, lanes, reach};
        in.data = input_memory.get(in.size());
        for (long e = 0; e < s.operations; e++) {
          if (e == 0 || !s.shared) in.rectify(input, n, e);
          for (long oy = first; oy < last; oy++) {
            depthwise_row<T, K, false>(line, in.at_row(oy * s.stride - reach), row,
                                       kernels.depthwise + e * kernels.taps * lanes, cols, s.stride,
                                       s.dilation, lanes);
            pointwise_row(result, line, kernels.transposed + e * s.channels * lanes, cols,
                          s.channels, lanes);
            T *to = y + ((n * rows + oy) * cols) * s.written() + e * s.channels;
            copy_pixels(to, s.written(), result, lanes, cols, s.channels);
          }
        }
      }
  }
}

template <class T, int K>
void backward(const Shape &s, const Input<T> &input, const T *wd, const T *wp, const T *g, T *gx,
              T *gwd, T *gwp) {
  const Kernels<T> kernels(s, wd, wp);
  const long lanes = kernels.lanes, taps = kernels.taps, reach = s.reach();
  const long rows = s.out(s.height), cols = s.out(s.width);
  const long row = (s.width + 2 * reach + s.stride) * lanes;
  const long fits = BAND_BYTES / ((s.operations + 1) * row * long(sizeof(T))) - 2 * reach;
  const long band = std::min(rows, std::max(2L, fits / s.stride));
  const long bands = (rows + band - 1) / band;
  const long d = s.operations * taps * lanes, p = s.operations * s.channels * lanes;
  const long threads = omp_get_max_threads();
  std::vector<T> sums;
  if (gwd) sums.assign(threads * (d + p) + LANES<T>, 0);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch<T> input_memory, output_memory, line_memory;
    T *line = line_memory.get((3 * cols + s.width) * lanes);
    T *gradient = line + cols * lanes, *spread = gradient + cols * lanes, *total = spread + cols * lanes;
    auto address = reinterpret_cast<size_t>(sums.data());
    T *sum_d = gwd ? reinterpret_cast<T *>((address + 63) / 64 * 64) + omp_get_thread_num() * (d + p)
                   : nullptr;
    T *sum_p = sum_d + d;
    std::fill(gradient, gradient + cols * lanes, T(0));
#pragma omp for schedule(static) collapse(2)
    for (long n = 0; n < s.n; n++)
      for (long b = 0; b < bands; b++) {
        const long first = b * band, last = std::min(rows, first + band);
        const long top = first * s.stride, bottom = std::min(s.height, last * s.stride);
        const long count = (last - first - 1) * s.stride + 2 * reach + 1;
        Rows<T> in{nullptr, top - reach, count, row, lanes, reach};
        // ∂/∂(depthwise result), with zeros between the pixels of a strided convolution.
        Rows<T> out{nullptr, top - reach, bottom - top + 2 * reach, row, lanes, reach};
        in.data = input_memory.get(in.size());
        T *planes = output_memory.get(s.operations * out.size());
        std::fill(planes, planes + s.operations * out.size(), T(0));
        const long from = gx ? std::max(0L, (out.first + s.stride - 1) / s.stride) : first;
        const long until = gx ? std::min(rows, (out.first + out.count - 1) / s.stride + 1) : last;
        for (long e = 0; e < s.operations; e++) {
          out.data = planes + e * out.size();
          if (gwd && (e == 0 || !s.shared)) in.rectify(input, n, e);
          for (long oy = from; oy < until; oy++) {
            const T *given = g + ((n * rows + oy) * cols) * s.written() + e * s.channels;
            copy_pixels(gradient, lanes, given, s.written(), cols, s.channels);
            pointwise_row(spread, gradient, kernels.pointwise + e * s.channels * lanes, cols,
                          s.channels, lanes);
            if (gx)
              copy_pixels(out.at_row(oy * s.stride) + reach * lanes, s.stride * lanes, spread, lanes,
                          cols, lanes);
            if (!gwd || oy < first || oy >= last) continue;
            const T *window = in.at_row(oy * s.stride - reach);
            depthwise_row<T, K, false>(line, window, row, kernels.depthwise + e * taps * lanes, cols,
                                       s.stride, s.dilation, lanes);
            add_outer(sum_p + e * s.channels * lanes, line, gradient, cols, s.channels, lanes);
            add_taps<T, K>(sum_d + e * taps * lanes, window, row, spread, cols, s.stride, s.dilation,
                           lanes);
          }
        }
        if (!gx) continue;
        for (long iy = top; iy < bottom; iy++)
          for (long e = 0; e < s.operations; e++) {
            out.data = planes + e * out.size();
            const T *window = out.at_row(iy - reach);
            const T *weight = kernels.flipped + e * taps * lanes;
            if (e == 0 || !s.shared)
              depthwise_row<T, K, false>(total, window, row, weight, s.width, 1, s.dilation, lanes);
            else
              depthwise_row<T, K, true>(total, window, row, weight, s.width, 1, s.dilation, lanes);
            if (s.shared && e + 1 < s.operations) continue;
            for (long i = 0; i < s.width; i++) {
              const long at = input.index(n, iy, i), block = s.block(e);
              T *to = gx + at + block;
              input.read(to, at, block);
              for (long c = 0; c < s.channels; c++)
                to[c] = to[c] <= 0 ? T(0) : total[i * lanes + c];
            }
          }
      }
  }
  if (!gwd) return;
  auto address = reinterpret_cast<size_t>(sums.data());
  T *sum = reinterpret_cast<T *>((address + 63) / 64 * 64);
  for (long t = 1; t < threads; t++)
    for (long i = 0; i < d + p; i++) sum[i] += sum[t * (d + p) + i];
  for (long e = 0; e < s.operations; e++)
    for (long c = 0; c < s.channels; c++) {
      for (long t = 0; t < taps; t++)
        gwd[(e * s.channels + c) * taps + t] = sum[(e * taps + t) * lanes + c];
      for (long i = 0; i < s.channels; i++)
        gwp[(e * s.channels + c) * s.channels + i] = sum[d + (e * s.channels + i) * lanes + c];
    }
}

// Sums over pixels are taken in blocks of rows, whose parts are added up in double precision.
constexpr long ROWS = 128;

// sums[q · channels + c] = Σ_r visit(r, c)[q] for Q quantities of each of `channels` channels.
template <class T, int Q, class Visit>
std::vector<double> channel_sums(long rows, long channels, Visit visit) {
  const long threads = omp_get_max_threads(), size = Q * channels;
  std::vector<double> sums(threads * size, 0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long block = 0; block < rows; block += ROWS) {
    double *sum = sums.data() + omp_get_thread_num() * size;
    const long end = std::min(rows, block + ROWS);
    long c = 0;
    // Four vectors at once read whole lines of memory in their order.
    auto add = [&](auto width) {
      T part[Q][4 * LANES<T>] = {};
      for (long r = block; r < end; r++)
        for (long lane = 0; lane < width; lane++) {
          const auto values = visit(r, c + lane);
          for (int q = 0; q < Q; q++) part[q][lane] += values[q];
        }
      for (int q = 0; q < Q; q++)
        for (long lane = 0; lane < width; lane++) sum[q * channels + c + lane] += part[q][lane];
      c += width;
    };
    while (c + 4 * LANES<T> <= channels) add(std::integral_constant<long, 4 * LANES<T>>());
    while (c + LANES<T> <= channels) add(std::integral_constant<long, LANES<T>>());
    if (c < channels) add(channels - c);
  }
  for (long t = 1; t < threads; t++)
    for (long i = 0; i < size; i++) sums[i] += sums[t * size + i];
  return sums;
}

// Mean and biased variance of each channel of `rows` pixels.
template <class T> void moments(long rows, long channels, const T *x, T *mean, T *var) {
  // Sums of differences from the first pixel lose no digits to a mean far from zero.
  const auto sums = channel_sums<T, 2>(rows, channels, [=](long r, long c) {
    const T value = x[r * channels + c] - x[c];
    return std::array<T, 2>{value, value * value};
  });
  for (long c = 0; c < channels; c++) {
    const double shift = sums[c] / rows;
    mean[c] = T(x[c] + shift);
    var[c] = T(std::max(0.0, sums[channels + c] / rows - shift * shift));
  }
}

// total = offset + Σ_k factors[k] · terms[k], factors and offset by channel. A term has a channel
// for each of the total's, or widths[k] channels, which are repeated.
template <class T>
void weighted_sum(long count, long rows, long channels, const long *widths, const T *const *terms,
                  const T *const *factors, const T *offset, T *total) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < rows; r++) {
    T *to = total + r * channels;
    std::copy(offset, offset + channels, to);
    for (long k = 0; k < count; k++) {
      const long width = widths[k];
      const T *from = terms[k] + r * width;
      for (long block = 0; block < channels; block += width) {
        const T *factor = factors[k] + block;
        for (long c = 0; c < width; c++) to[block + c] += factor[c] * from[c];
      }
    }
  }
}

// Gradients of E copies of a batch norm, weight · x̂ + bias with x̂ = (x − mean) · scale and
// scale = 1 / std, each with a weight and bias of its own:
//   ∂bias_e = Σ g_e,  ∂weight_e = Σ g_e x̂,
//   ∂x = scale · Σ_e weight_e · (g_e − ∂bias_e / rows − x̂ ∂weight_e / rows),
// or of weight · x alone, without the mean and scale of statistics.
template <class T>
void norm_backward(long rows, long channels, long copies, const T *g, const T *x, const T *mean,
                   const T *scale, const T *weight, T *of_x, T *of_weight, T *of_bias) {
  const long wide = copies * channels;
  std::vector<T> centre(channels, T(0)), times_g(wide), times_x(channels, T(0)),
      constant(channels, T(0));
  if (mean) std::copy(mean, mean + channels, centre.begin());
  const T *middle = centre.data();
  for (long e = 0; e < copies; e++) {
    const T *own = g + e * channels;
    const auto sums = channel_sums<T, 2>(rows, channels, [=](long r, long c) {
      const T given = own[r * wide + c];
      return std::array<T, 2>{given, given * (x[r * channels + c] - middle[c])};
    });
    for (long c = 0; c < channels; c++) {
      const long at = e * channels + c;
      const double deviation = scale ? scale[c] : T(1), slope = sums[channels + c] * deviation;
      const double factor = (weight ? double(weight[at]) : 1.0) * deviation;
      of_bias[at] = T(sums[c]);
      of_weight[at] = T(slope);
      times_g[at] = T(factor);
      if (!mean) continue;
      times_x[c] -= T(factor * deviation * slope / rows);
      constant[c] -= T(factor * sums[c] / rows);
    }
  }
  if (!of_x) return;
#pragma omp parallel for schedule(static)
  for (long r = 0; r < rows; r++) {
    const T *own = x + r * channels;
    T *to = of_x + r * channels;
    for (long c = 0; c < channels; c++) to[c] = times_x[c] * (own[c] - middle[c]) + constant[c];
    for (long e = 0; e < copies; e++) {
      const T *given = g + r * wide + e * channels, *factor = times_g.data() + e * channels;
      for (long c = 0; c < channels; c++) to[c] += factor[c] * given[c];
    }
  }
}

template <class T>
void forward_any(const Shape *s, const T *x, const T *factor, const T *offset, const T *wd,
                 const T *wp, T *y) {
  const Input<T> input{x, factor, offset, *s};
  s->kernel == 3 ? forward<T, 3>(*s, input, wd, wp, y) : forward<T, 5>(*s, input, wd, wp, y);
}

template <class T>
void backward_any(const Shape *s, const T *x, const T *factor, const T *offset, const T *wd,
                  const T *wp, const T *g, T *gx, T *gwd, T *gwp) {
  const Input<T> input{x, factor, offset, *s};
  s->kernel == 3 ? backward<T, 3>(*s, input, wd, wp, g, gx, gwd, gwp)
                 : backward<T, 5>(*s, input, wd, wp, g, gx, gwd, gwp);
}

} // namespace

#define EXPORT(T)                                                                                  \
  extern "C" void forward_##T(const Shape *s, const T *x, const T *factor, const T *offset,        \
                              const T *wd, const T *wp, T *y) {                                    \
    forward_any(s, x, factor, offset, wd, wp, y);                                                  \
  }                                                                                                \
  extern "C" void backward_##T(const Shape *s, const T *x, const T *factor, const T *offset,       \
                               const T *wd, const T *wp, const T *g, T *gx, T *gwd, T *gwp) {      \
    backward_any(s, x, factor, offset, wd, wp, g, gx, gwd, gwp);                                   \
  }                                                                                                \
  extern "C" void moments_##T(long rows, long channels, const T *x, T *mean, T *var) {             \
    moments(rows, channels, x, mean, var);                                                         \
  }                                                                                                \
  extern "C" void weighted_sum_##T(long count, long rows, long channels, const long *widths,       \
                                   const T *const *terms, const T *const *factors,                 \
                                   const T *offset, T *total) {                                    \
    weighted_sum(count, rows, channels, widths, terms, factors, offset, total);                    \
  }                                                                                                \
  extern "C" void norm_backward_##T(long rows, long channels, long copies, const T *g, const T *x, \
                                    const T *mean, const T *scale, const T *weight, T *of_x,       \
                                    T *of_weight, T *of_bias) {                                    \
    norm_backward(rows, channels, copies, g, x, mean, scale, weight, of_x, of_weight, of_bias);    \
  }

EXPORT(float)
EXPORT(double)
