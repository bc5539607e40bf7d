# Over budget: parameters: the signatures are Transformer Engine's.
"""Cross entropy of a vocabulary that may be split over ranks; of one rank, Redline's op."""

from redline import ops, parallel
from redline.extensions.transformer_engine.table import works


def parallel_cross_entropy(
    logits,
    labels,
    label_smoothing=0.0,
    reduce_loss=False,
    dist_process_group=None,
    ignore_idx=-100,
    is_cg_capturable=False,
):
    """float32 losses of labels' shape, 0 where the label is ignore_idx; or their mean.

    logits [..., vocabulary]; labels [...]. The mean, with reduce_loss, is over the rows that are
    not ignored. is_cg_capturable: always so.
    """
    parallel.one_rank("te_parallel_cross_entropy", dist_process_group)
    reduction = "mean" if reduce_loss else "none"
    return ops.cross_entropy(logits, labels, reduction, ignore_idx, label_smoothing)


@works("`cross_entropy`")
def te_parallel_cross_entropy(logits, labels, tp_group=None, is_cg_capturable=False):
    """float32 losses [s, b] of logits [s, b, vocabulary] and labels [s, b], -100 ignored."""
    return parallel_cross_entropy(logits, labels, dist_process_group=tp_group)
