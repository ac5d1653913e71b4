"""Every rule, in the order of reports. A rule is one file; a new one is added to the tuple."""

from __future__ import annotations

from typing import Final

from bnify.auditing.rule import Rule
from bnify.auditing.rules.bn101_nonfinite_stats import NonfiniteStatistics
from bnify.auditing.rules.bn102_stats_never_updated import StatisticsNeverUpdated
from bnify.auditing.rules.bn103_stats_missing import StatisticsMissing
from bnify.auditing.rules.bn104_stats_underconverged import StatisticsUnderconverged
from bnify.auditing.rules.bn105_vanishing_variance import VanishingVariance
from bnify.auditing.rules.bn106_dead_channels import DeadChannels
from bnify.auditing.rules.bn107_low_precision_stats import LowPrecisionStatistics
from bnify.auditing.rules.bn108_uneven_batch_counts import UnevenBatchCounts
from bnify.auditing.rules.bn201_redundant_bias import RedundantBias
from bnify.auditing.rules.bn202_dropout_before_bn import DropoutBeforeNorm
from bnify.auditing.rules.bn203_momentum_out_of_range import MomentumOutOfRange
from bnify.auditing.rules.bn204_mixed_hyperparameters import MixedHyperparameters
from bnify.auditing.rules.bn205_one_value_per_channel import OneValuePerChannel
from bnify.auditing.rules.bn206_shared_call_sites import SharedCallSites
from bnify.auditing.rules.bn207_wrong_axis import WrongAxis
from bnify.auditing.rules.bn208_double_normalization import DoubleNormalization
from bnify.auditing.rules.bn209_bn_at_output import NormAtOutput
from bnify.auditing.rules.bn210_unused_bn import UnusedNorm
from bnify.auditing.rules.bn211_norm_over_one_element import NormOverOneElement
from bnify.auditing.rules.bn212_lazy_uninitialised import LazyUninitialised
from bnify.auditing.rules.bn213_no_normalization import NoNormalization
from bnify.auditing.rules.bn301_half_frozen import HalfFrozen
from bnify.auditing.rules.bn302_ddp_without_sync import DistributedWithoutSync
from bnify.auditing.rules.bn303_small_batch_statistics import SmallBatchStatistics
from bnify.auditing.rules.bn305_train_eval_gap import TrainEvalGap
from bnify.auditing.rules.bn306_stats_drift import StatisticsDrift
from bnify.auditing.rules.bn307_ema_buffers_stale import AverageWithoutStatistics
from bnify.auditing.rules.bn308_weight_decay_on_bn import WeightDecayOnNorm
from bnify.auditing.rules.bn309_stats_contamination import StatisticsContamination
from bnify.auditing.rules.bn401_foldable_bn_left import FoldableNormLeft
from bnify.auditing.rules.bn402_unfoldable_bn import UnfoldableNorm
from bnify.auditing.rules.bn403_fold_range import FoldRange
from bnify.auditing.rules.bn404_batch_stats_at_inference import BatchStatisticsAtInference
from bnify.auditing.rules.bn405_exported_in_training import ExportedInTraining

RULES: Final[tuple[Rule, ...]] = (
    NonfiniteStatistics(),
    StatisticsNeverUpdated(),
    StatisticsMissing(),
    StatisticsUnderconverged(),
    VanishingVariance(),
    DeadChannels(),
    LowPrecisionStatistics(),
    UnevenBatchCounts(),
    RedundantBias(),
    DropoutBeforeNorm(),
    MomentumOutOfRange(),
    MixedHyperparameters(),
    OneValuePerChannel(),
    SharedCallSites(),
    WrongAxis(),
    DoubleNormalization(),
    NormAtOutput(),
    UnusedNorm(),
    NormOverOneElement(),
    LazyUninitialised(),
    NoNormalization(),
    HalfFrozen(),
    DistributedWithoutSync(),
    SmallBatchStatistics(),
    TrainEvalGap(),
    StatisticsDrift(),
    AverageWithoutStatistics(),
    WeightDecayOnNorm(),
    StatisticsContamination(),
    FoldableNormLeft(),
    UnfoldableNorm(),
    FoldRange(),
    BatchStatisticsAtInference(),
    ExportedInTraining(),
)
