# Isotropic linear elasticity of a steel. Stress and moduli in MPa, time in s.
#
# The strain tensor follows torch's default dtype, so that the same file serves the float32 variant:
# call torch.set_default_dtype (neml2-run does) before loading it.

[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 1.0, 11))'
  []
  # Three material points: stretch along x, shear in the xy plane, equal stretch along all axes.
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 2.0e-3, 11).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.3, -0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'elasticity'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [elasticity]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficients = '205000 0.29'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
[]
