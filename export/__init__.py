# SPDX-License-Identifier: Apache-2.0
"""What leaves a checkpoint for other programs: rows as files, the graph as ONNX, tables made smaller."""
