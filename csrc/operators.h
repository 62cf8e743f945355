// The operators in C++: the arguments of the schemas in segvit_kernels/ops, once for the CPU and once for CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

// clang-format off
#define SEGVIT_DECLARE_OPERATORS                                                                                  \
  using torch::headeronly::ScalarType;                                                                            \
  using torch::stable::Tensor;                                                                                    \
  using Optional = std::optional<Tensor>;                                                                         \
                                                                                                                  \
  std::tuple<Tensor, Tensor, Tensor> atm_fwd(                                                                     \
      Tensor query, Tensor key, Tensor value, Optional previous_masks, Optional seed, double scale,               \
      double dropout_p, bool need_masks, Optional key_padding_mask);                                              \
  std::tuple<Tensor, Tensor, Tensor> atm_bwd(                                                                     \
      Optional grad_output, Optional grad_masks, Tensor query, Tensor key, Tensor value, Tensor output,           \
      Tensor lse, Optional seed, double scale, double dropout_p, bool deterministic, Optional key_padding_mask);  \
                                                                                                                  \
  Tensor linear(                                                                                                  \
      Tensor input, Tensor weight, Optional bias, Optional panels, Optional factors, bool gelu,                   \
      Optional norm_weight, Optional norm_bias, double norm_eps, Optional scale, Optional residual);              \
                                                                                                                  \
  std::tuple<Tensor, Tensor, Tensor> mask_iou(                                                                    \
      Tensor a, Tensor b, int64_t height, int64_t width, bool soft, double threshold);                            \
                                                                                                                  \
  std::tuple<Tensor, Tensor, Tensor> panoptic_argmax(                                                             \
      Tensor mask_logits, Tensor scores, int64_t height, int64_t width, int64_t resized_height,                   \
      int64_t resized_width, int64_t crop_height, int64_t crop_width, bool first, bool last, double threshold,    \
      bool weighted);                                                                                             \
                                                                                                                  \
  std::tuple<Tensor, Tensor> query_attention_fwd(                                                                 \
      Tensor query, Tensor key, Tensor value, Optional seed, double scale, double dropout_p,                      \
      Optional key_padding_mask);                                                                                 \
  std::tuple<Tensor, Tensor, Tensor> query_attention_bwd(                                                         \
      Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, Optional seed,       \
      double scale, double dropout_p, bool deterministic, Optional key_padding_mask);                             \
                                                                                                                  \
  std::tuple<Tensor, Tensor, Tensor> mask_binarize(                                                               \
      Tensor mask_logits, Optional boxes, int64_t height, int64_t width, double threshold, int64_t layout);       \
  std::tuple<Tensor, Tensor> mask_rle(Tensor columns, int64_t height);                                            \
                                                                                                                  \
  std::tuple<Tensor, Tensor> mask_loss_fwd(                                                                       \
      std::vector<Tensor> mask_logits, Tensor targets, Optional matches, int64_t num_classes,                     \
      double focal_alpha, double focal_gamma, bool mask_ignored);                                                 \
  std::vector<Tensor> mask_loss_bwd(                                                                              \
      Tensor grad_sums, std::vector<Tensor> mask_logits, Tensor targets, Optional matches, Tensor areas,          \
      int64_t num_classes, double focal_alpha, double focal_gamma, bool mask_ignored);                            \
  std::tuple<Tensor, Tensor, Tensor> mask_matching_sums(                                                          \
      Tensor mask_logits, Tensor targets, int64_t num_classes, double focal_alpha, double focal_gamma);           \
                                                                                                                  \
  std::tuple<Tensor, Tensor> semantic_argmax(                                                                     \
      std::vector<Tensor> mask_logits, Tensor class_probs, std::vector<Tensor> views, int64_t batch,              \
      int64_t height, int64_t width, std::vector<double> reach, bool sigmoid, bool need_scores, double prune);    \
  std::tuple<Tensor, Tensor> semantic_topk(                                                                       \
      std::vector<Tensor> mask_logits, Tensor class_probs, std::vector<Tensor> views, int64_t batch,              \
      int64_t height, int64_t width, std::vector<double> reach, bool sigmoid, int64_t k, double prune);           \
                                                                                                                  \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> subsample_norm_fwd(                                          \
      Tensor x, Optional weight, Optional bias, int64_t height, int64_t width, int64_t stride,                    \
      int64_t prefix_tokens, double eps, ScalarType dtype);                                                       \
  std::tuple<Tensor, Tensor, Tensor> subsample_norm_bwd(                                                          \
      Optional grad_normed, Optional grad_normed_sub, Optional grad_x_sub, Tensor x, Optional weight,             \
      Tensor mean, Tensor rstd, int64_t height, int64_t width, int64_t stride, int64_t prefix_tokens);
// clang-format on

namespace segvit::cpu {
SEGVIT_DECLARE_OPERATORS
}
namespace segvit::cuda {
SEGVIT_DECLARE_OPERATORS
}
