"""Thin modules over the ops: parameters, and one call each. The numerics are in `stablekern.ops`."""

from stablekern.nn.cayley import CayleyPropagator, GraphHamiltonian
from stablekern.nn.complex_layers import BornHead, ComplexLinear, ComplexRMSNorm, ComplexSelectiveScan
from stablekern.nn.detector import DetectorConfig, SeizureDetector
from stablekern.nn.graph import DynamicLaplacianPE, EdgeStream, GraphMixer
from stablekern.nn.mamba import Mamba
from stablekern.nn.mamba2 import BiMamba2, Mamba2
from stablekern.nn.mamba_parts import MambaCache
from stablekern.nn.mamba_stack import Mamba2Stack
from stablekern.nn.norms import LayerScale, RMSNorm, RMSNormGated
from stablekern.nn.smoothing import TemporalEMA
from stablekern.nn.tcn import ProjectionHead, TCNEncoder

__all__ = [
    "BiMamba2",
    "BornHead",
    "CayleyPropagator",
    "ComplexLinear",
    "ComplexRMSNorm",
    "ComplexSelectiveScan",
    "DetectorConfig",
    "DynamicLaplacianPE",
    "EdgeStream",
    "GraphHamiltonian",
    "GraphMixer",
    "LayerScale",
    "Mamba",
    "Mamba2",
    "Mamba2Stack",
    "MambaCache",
    "ProjectionHead",
    "RMSNorm",
    "RMSNormGated",
    "SeizureDetector",
    "TCNEncoder",
    "TemporalEMA",
]
