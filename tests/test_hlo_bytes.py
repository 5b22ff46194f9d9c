"""What the counter of bytes says of programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from hlo_bytes import Hlo

TEXT = """HloModule m
%inner (p: f32[100,8], i: s32[], u: f32[1,8]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  %new = f32[1,8]{1,0} add(%old, %u)
  ROOT %out = f32[100,8]{1,0} dynamic-update-slice(%p, %new, %i, %zero)
}
%body (c: (f32[100,8], bf16[4])) -> (f32[100,8], bf16[4]) {
  %c = (f32[100,8]{1,0}, /*index=1*/bf16[4]{0}) parameter(0)
  %pool = f32[100,8]{1,0} get-tuple-element(%c), index=0
  %x = bf16[4]{0} get-tuple-element(%c), index=1
  %k = s32[] constant(3)
  %row = f32[1,8]{1,0} constant({...})
  %fused = f32[100,8]{1,0} fusion(%pool, %k, %row), kind=kLoop, calls=%inner
  %y = bf16[4]{0} custom-call(%x, %fused), custom_call_target="f"
  ROOT %t = (f32[100,8]{1,0}, bf16[4]{0}) tuple(%fused, %y)
}
%condition (c: (f32[100,8], bf16[4])) -> pred[] {
  %c = (f32[100,8]{1,0}, bf16[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
ENTRY %main (a: f32[100,8], b: bf16[4]) -> (f32[100,8], bf16[4]) {
  %a = f32[100,8]{1,0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %t = (f32[100,8]{1,0}, bf16[4]{0}) tuple(%a, %b)
  ROOT %w = (f32[100,8]{1,0}, bf16[4]{0}) while(%t), condition=%condition, body=%body, CONFIG
}
""".replace("CONFIG", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_slices_and_updates_in_place_count_for_what_they_touch():
    hlo = Hlo(TEXT, pool_bytes=3200)
    body = hlo.loop_with('custom_call_target="f"')
    update = 3 * 8 * 4 + 4  # a row read, another, one written, an index
    assert hlo.bytes(body) == update + 2 * 4 * 2  # the custom call, without the pool
    assert hlo.bytes(hlo.entry) == 5 * hlo.bytes(body)
    assert hlo.largest(body)[0] == ("fused f32[100,8]{1,0}", update)


@pytest.mark.parametrize(("f", "expected"), [(lambda x: x + 1, 2 * 4000), (lambda x: x[:10] * 2, 2 * 40)])
def test_a_compiled_program_counts_what_it_reads_and_writes(f, expected):
    hlo = Hlo(jax.jit(f).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile().as_text(), 1e9)
    assert hlo.bytes(hlo.entry) == expected
