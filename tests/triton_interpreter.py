"""Triton's interpreter at twice its speed, for kernels of many small steps. Results and errors do not change, but for
conversions to float8, which the interpreter itself rounds wrongly.
"""

import dataclasses

import torch
from triton.language import core
from triton.runtime import interpreter


def accelerate() -> None:
    """Removes repeated work from Triton's interpreter, for all kernels of this process."""
    compute_no_unused_overflow_checks()
    prepare_called_functions_once()
    remember_numpy_types()
    remember_block_types()
    remember_shapes()
    round_to_float8_as_a_gpu()


def compute_no_unused_overflow_checks() -> None:
    """The option `debug`, which is off, would raise an error on overflow. Triton's compilers switch both off."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def prepare_called_functions_once() -> None:
    """A launch prepares triton.language for the interpreter. Each function that the kernel calls prepares it again.

    A first time is needed, because modules can see other parts of Triton than the kernel's module.
    """
    prepared = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def remember_numpy_types() -> None:
    derive, known = interpreter._get_np_dtype, {}

    def numpy_type(triton_type: core.dtype):
        if triton_type.name not in known:
            known[triton_type.name] = derive(triton_type)
        return known[triton_type.name]

    interpreter._get_np_dtype = numpy_type


def remember_block_types() -> None:
    """The shape of a block is validated and printed once. All blocks of the same type share the result."""
    derive, known = core.block_type.__init__, {}

    def initialise(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in known:
            derive(self, element_ty, shape)
            known[key] = vars(self)
        self.__dict__ = known[key]

    core.block_type.__init__ = initialise


def remember_shapes() -> None:
    """Tensors of the same type share their shape, a tuple of constants."""
    derive, known = core.tensor.__init__, {}

    def initialise(self, handle, type):
        if type.name not in known:
            derive(self, handle, type)
            known[type.name] = self.shape, self.numel
        self.shape, self.numel = known[type.name]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    core.tensor.__init__ = initialise


def round_to_float8_as_a_gpu() -> None:
    """Half to even. The interpreter rounds half away from zero, and loses the carry from the mantissa."""
    convert = interpreter.InterpreterBuilder.create_fp_to_fp
    float8 = {core.float8e4nv: torch.float8_e4m3fn, core.float8e5: torch.float8_e5m2}

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        dtype = float8.get(dst_type.scalar)
        if dtype is None or src.dtype.scalar != core.float32:
            return convert(self, src, dst_type, rounding_mode)
        rounded = torch.from_numpy(src.data).to(dtype).view(torch.uint8).numpy()
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
