"""Transformer Engine's layers on torch, split over ranks as the real ones are."""

import torch
import torch.nn.functional as F

import transformer_engine.pytorch.distributed
import transformer_engine.pytorch.fp8
import transformer_engine.pytorch.ops  # noqa: F401
from transformer_engine.pytorch.fp8 import called, fp8_autocast  # noqa: F401


class _Base(torch.nn.Module):
    """What Megatron's wrappers read of a module."""

    def _take(self, in_features, out_features, tp_group, tp_size, parallel_mode, bias, **rest):
        self.in_features, self.out_features = in_features, out_features
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.sequence_parallel = bias, rest["sequence_parallel"]
        self.return_bias = rest["return_bias"]
        rows, columns = out_features, in_features
        if parallel_mode == "column":
            rows //= tp_size
        elif parallel_mode == "row":
            columns //= tp_size
        made = {"dtype": rest["params_dtype"], "device": rest["device"]}
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, **made))
        _mark(self.weight, parallel_mode is not None, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(rows, **made))
            _mark(self.bias, parallel_mode == "column", 0)
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
        else:
            self.bias = None

    def _multiply(self, hidden):
        """Linear with the communication of its mode; the bias apart where it is returned."""
        from megatron.core.tensor_parallel import mappings  # it imports this package itself

        if self.parallel_mode == "column":
            if self.sequence_parallel:
                hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            else:
                hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        alone = self.return_bias or self.parallel_mode == "row"
        out = F.linear(hidden, self.weight, None if alone else self.bias)
        called(self, hidden, out)
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
            if self.bias is not None and not self.return_bias:
                out = out + self.bias
        return (out, self.bias) if self.return_bias else out


def _mark(parameter, is_parallel, dimension):
    parameter.tensor_model_parallel = is_parallel
    parameter.partition_dim = dimension
    parameter.partition_stride = 1


class Linear(_Base):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
    ):
        super().__init__()
        self.save_original_input = False  # Megatron-Core sets it under FP8
        self._take(
            in_features,
            out_features,
            tp_group,
            tp_size,
            parallel_mode,
            bias,
            sequence_parallel=sequence_parallel,
            return_bias=return_bias,
            params_dtype=params_dtype,
            device=device,
        )

    def forward(self, inp, is_first_microbatch=None):
        return self._multiply(inp)


class LayerNormLinear(_Base):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        zero_centered_gamma=False,
        device="cuda",
    ):
        super().__init__()
        assert normalization == "RMSNorm" and not return_layernorm_output
        self.eps = eps
        norm = torch.ones(in_features, dtype=params_dtype, device=device)
        self.layer_norm_weight = torch.nn.Parameter(norm)
        self.layer_norm_weight.sequence_parallel = sequence_parallel
        self._take(
            in_features,
            out_features,
            tp_group,
            tp_size,
            parallel_mode,
            bias,
            sequence_parallel=sequence_parallel,
            return_bias=return_bias,
            params_dtype=params_dtype,
            device=device,
        )

    def forward(self, inp, is_first_microbatch=None):
        weight = self.layer_norm_weight
        return self._multiply(F.rms_norm(inp, weight.shape, weight, self.eps))


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device="cuda",
    ):
        super().__init__()
        self.eps = eps
        hidden_size = normalized_shape or hidden_size
        weight = torch.ones(hidden_size, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden):
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        attn_mask_type="causal",
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        pad_between_seqs=None,
    ):
        """Rows [T, heads, width], as `thd` has them, to [T, heads * width]."""
        assert not pad_between_seqs
        assert qkv_format == "thd" and attn_mask_type in ("padding_causal", "padding")
        borders = cu_seqlens_q.tolist()
        assert borders[-1] == len(query_layer) and cu_seqlens_kv.tolist() == borders
        assert max_seqlen_q == max(b - a for a, b in zip(borders, borders[1:], strict=False))
        parts = []
        for start, end in zip(borders, borders[1:], strict=False):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query_layer, key_layer, value_layer))
            part = F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                is_causal=attn_mask_type == "padding_causal",
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


class GroupedLinear(torch.nn.Module):
    """Asked for when Megatron-Core is imported; no experts here."""
