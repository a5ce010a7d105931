# Linear isotropic elasticity: one forward graph, strain in, stress out.
# Three load steps on a batch of two bars, so that the stub can be driven as it is.

[Tensors]
  [hours]
    type = Python
    expr = 'Scalar(torch.tensor([0.0, 1.5, 4.0], dtype=torch.float64))'
  []
  # Axial strain with lateral contraction and some shear; the second bar is stretched twice as far.
  [bar_strains]
    type = Python
    expr = 'SR2(torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64).reshape(3, 1, 1) * torch.tensor([[1e-3], [2e-3]], dtype=torch.float64) * torch.tensor([1.0, -0.3, -0.2, 0.1, 0.0, 0.4], dtype=torch.float64))'
  []
[]

[Models]
  [elasticity]
    type = LinearIsotropicElasticity
    strain = 'strain'
    stress = 'stress'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
    coefficients = '190.0 0.29'
  []
[]

# The driver speaks to neml2 3.0.6 and later; before, its word was force_ for prescribed_. A compile does not mind.
[Drivers]
  [pull]
    type = TransientDriver
    model = 'elasticity'
    prescribed_time = 'hours'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'bar_strains'
  []
[]
