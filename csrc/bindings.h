// The parts of the Python module dcae_fast._C that have files of their own.
#pragma once

#include <torch/csrc/utils/pybind.h>

void bind_convolution(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
