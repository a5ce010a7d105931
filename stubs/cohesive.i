# A cohesive zone: the traction of two faces that are drawn apart, and how fast they open. Lengths in mm, stress in MPa.
#
# One explicit segment from a vector to vectors and a scalar; the rate divides by the time step, which may be zero.

[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 1.0, 11, dtype=torch.float64))'
  []
  [jumps]
    type = Python
    expr = 'Vec(torch.linspace(0.0, 1.0, 11, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[2.0, 1.0, 0.5], [0.3, 0.2, 0.1]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'cohesive'
    prescribed_time = 'times'
    prescribed_Vec_names = 'separation'
    prescribed_Vec_values = 'jumps'
  []
[]

[Models]
  [parts]
    type = VecComponents
    from = 'separation'
    to = 'normal_separation tangential_separation_1 tangential_separation_2'
  []
  [law]
    type = SalehaniIraniTraction
    normal_characteristic_length = 1.2
    tangential_characteristic_length = 0.8
    normal_strength = 3.0
    shear_strength = 2.0
  []
  [speed]
    type = VecVariableRate
    variable = 'separation'
  []
  [cohesive]
    type = ComposedModel
    models = 'parts law speed'
  []
[]
