// The verbs as nodes of a tape; inferneo_core/ops/base.py says what each one computes.
//
// Pointers are to memory that the tape's owner keeps alive: packed weights, norms, the RoPE table, the cache.
#pragma once

#include "tape.h"

namespace inferneo {

class EmbedNode : public Node {
 public:
  explicit EmbedNode(const PackedLinear& weight) : weight_(weight) {}
  void run(const Frame& frame, int64_t index, Lane lane) const override;

 private:
  const PackedLinear& weight_;
};

// A product that may have a norm in front: what the nodes with weights share.
//
// Activations of few tokens are prepared by every lane for itself; those of more, together.
class ProductNode : public Node {
 public:
  ProductNode(const PackedLinear& weight, const float* norm_weight, float eps);
  int64_t shared_bytes(const StepInput& step) const override;
  int64_t lane_bytes(const StepInput& step) const override;

 protected:
  // How many rows of activations a step has for this product.
  virtual int64_t num_rows(const StepInput& step) const { return step.num_tokens; }
  // The normed, prepared activations. rows: which of x's rows, or null for the first num_rows.
  const void* prepare(const Frame& frame, const float* x, const int64_t* rows, Lane lane) const;
  void multiply(const Frame& frame, const void* prepared, Share tokens, Share rows, float* out, int64_t stride,
                const float* residual = nullptr) const;
  // f(tokens, rows) for pieces of a product with `rows` rows, whole granules, slab by slab of its tokens, until the
  // lanes have done them all. A piece has the rows of the longest at most.
  template <class F>
  void share_product(const Frame& frame, Lane lane, int64_t rows, int64_t granule, F f) const;
  // Rows of such a piece, for several tokens, unless the granule has more: a lane takes some of the shortest, one
  // behind the other, as one.
  int64_t shortest_piece(int64_t num_tokens) const;
  int64_t longest_piece(int64_t num_tokens) const;

  const PackedLinear& weight_;
  // What a step asks of every node before it runs any; each weight's own would be a cold page.
  const int64_t in_features_, out_features_, slab_;

 private:
  void prepare_quad(const Frame& frame, const float* x, const int64_t* rows, std::byte* scratch, std::byte* out,
                    int64_t quad) const;

  const float* norm_weight_;  // null: no norm
  const float eps_;
  const int64_t normed_bytes_, quad_bytes_;  // of a quad, normed and prepared
};

class QkvRopeStoreNode : public ProductNode {
 public:
  QkvRopeStoreNode(const PackedLinear& weight, const float* norm_weight, float eps, const float* rope,
                   const CacheView& cache)
      : ProductNode(weight, norm_weight, eps), rope_(rope), cache_(cache) {}
  void run(const Frame& frame, int64_t index, Lane lane) const override;
  int64_t shared_bytes(const StepInput& step) const override;
  bool stores() const override { return true; }

  int64_t num_heads() const { return out_features_ / cache_.head_dim - 2 * cache_.num_kv_heads; }

 private:
  void rotate_and_store(const Frame& frame, float* q, float* kv, Share tokens, Share rows) const;

  const float* rope_;  // [max_model_len, head_dim]
  const CacheView cache_;
};

class AttentionNode : public Node {
 public:
  AttentionNode(int64_t num_heads, const CacheView& cache) : num_heads_(num_heads), cache_(cache) {}
  void run(const Frame& frame, int64_t index, Lane lane) const override;
  int64_t shared_bytes(const StepInput& step) const override;
  int64_t lane_bytes(const StepInput& step) const override;

 private:
  const int64_t num_heads_;
  const CacheView cache_;
};

// inputs: x, and the residual if there is one.
class LinearAddNode : public ProductNode {
 public:
  explicit LinearAddNode(const PackedLinear& weight) : ProductNode(weight, nullptr, 0.0f) {}
  void run(const Frame& frame, int64_t index, Lane lane) const override;
};

class GateUpSiluNode : public ProductNode {
 public:
  using ProductNode::ProductNode;
  void run(const Frame& frame, int64_t index, Lane lane) const override;
  int64_t lane_bytes(const StepInput& step) const override;
};

// Gives [num_rows, vocab_size]: the rows of x that StepInput.rows names.
class LmHeadNode : public ProductNode {
 public:
  using ProductNode::ProductNode;
  void run(const Frame& frame, int64_t index, Lane lane) const override;
  bool takes_rows() const override { return true; }

 protected:
  int64_t num_rows(const StepInput& step) const override { return step.num_rows; }
};

}  // namespace inferneo
