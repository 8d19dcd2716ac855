// The softcap and its derivative in one lane. Included by products_lane.h, inside that lane's namespace; no include
// guard on purpose.

// Returns softcap tanh(z / softcap), with tanh(y) = 1 - 2 / (exp(2 y) + 1).
LANE V softcapped(V z, float softcap) {
  V y = over(z, set1(softcap));
  y = minimum(set1(10.0f), maximum(set1(-10.0f), y));  // tanh is 1 in float32 from there on
  const V power = exp2_of(mul(y, set1(2 * kLog2e)));
  return mul(set1(softcap), sub(set1(1.0f), over(set1(2.0f), add(power, set1(1.0f)))));
}

// Returns dz times the derivative of the softcap, 1 - (z / softcap)^2, where z is the capped logit; dz without a
// softcap.
LANE V softcap_backward(V dz, V z, float softcap) {
  if (softcap == 0) return dz;
  const V y = over(z, set1(softcap));
  return mul(dz, sub(set1(1.0f), mul(y, y)));
}
