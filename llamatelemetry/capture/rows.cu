// One block per (query, head): everything about a row of attention in one pass over it. out: (head, query, 6).
extern "C" __global__ void rows(const float* p, float* out, int n_query, int n_key, long row_stride,
                                long head_stride, int past) {
  const int q = blockIdx.x, h = blockIdx.y, position = past + q;
  const float* row = p + h * head_stride + q * row_stride;
  float s[4] = {0, 0, 0, 0};
  for (int k = threadIdx.x; k <= position && k < n_key; k += blockDim.x) {
    const float w = row[k];
    s[0] += w;
    if (w > 0) s[1] -= w * logf(w);
    s[2] += w * (position - k);
    s[3] = fmaxf(s[3], w);
  }
  __shared__ float part[32][4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int m = 0; m < 4; m++) {
    float v = s[m];
    for (int o = 16; o; o >>= 1) {
      const float other = __shfl_down_sync(0xffffffffu, v, o);
      v = m == 3 ? fmaxf(v, other) : v + other;
    }
    if (lane == 0) part[warp][m] = v;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float* target = out + (h * (long)n_query + q) * 6;
    for (int m = 0; m < 4; m++) {
      float v = part[0][m];
      for (int w = 1; w < blockDim.x / 32; w++) v = m == 3 ? fmaxf(v, part[w][m]) : v + part[w][m];
      target[m] = v;
    }
    target[4] = target[1] / logf(fmaxf(position, 1.f) + 1.f);
    target[5] = row[0];
  }
}
