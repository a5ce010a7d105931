# Isotropic linear elasticity whose two constants are promoted at compile time and so can be set per call.
# Stress and Young's modulus in MPa, time in s.

[Tensors]
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 1.0, 6, dtype=torch.float64))'
  []
  # Two material points: stretch along y with contraction, shear in the yz plane.
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.5e-3, 6, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[-0.2, 1.0, -0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'promoted'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [promoted]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficients = '71000 0.33'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
[]
