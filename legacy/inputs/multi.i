# A heated bar that creeps and ages: a forward part, an implicit update of a strain and a scalar, a forward part.
#   before:  the strain less the thermal expansion, and how strongly heat and squeezing age the bar
#   update:  creep through a dashpot; age, whose swelling unloads the dashpot and which dilation speeds up
#   after:   the stress that is left

[Tensors]
  [hours]
    type = Python
    expr = 'Scalar(torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64))'
  []
  [bar_temperatures]
    type = Python
    expr = 'Scalar(torch.tensor([[300.0, 300.0], [340.0, 360.0], [400.0, 330.0], [380.0, 310.0]], dtype=torch.float64))'
  []
  [bar_strains]
    type = Python
    expr = 'SR2(torch.tensor([0.0, 1.0, 2.0, 1.5], dtype=torch.float64).reshape(4, 1, 1) * torch.tensor([[1e-3], [-2e-3]], dtype=torch.float64) * torch.tensor([1.0, -0.25, -0.3, 0.2, -0.1, 0.5], dtype=torch.float64))'
  []
[]

[Models]
  # before
  [expansion]
    type = ThermalEigenstrain
    temperature = 'temperature'
    eigenstrain = 'thermal_strain'
    reference_temperature = '300.0'
    CTE = '1.2e-5'
  []
  [net]
    type = SR2LinearCombination
    from = 'strain thermal_strain'
    weights = '1.0 -1.0'
    to = 'net_strain'
  []
  [squeeze]
    type = SR2Invariant
    tensor = 'strain'
    invariant = 'squeeze'
    invariant_type = 'I1'
  []
  # The squeeze is here because 3.0.0 fails to export a forward Jacobian in which an output lacks one of the inputs.
  [heat]
    type = ScalarLinearCombination
    from = 'temperature squeeze'
    weights = '0.004 -30.0'
    offset = '-1.1'
    to = 'heat_drive'
  []

  # update
  [swell]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'age'
    isotropic_hardening = 'swell_size'
    saturated_hardening = '8e-4'
    saturation_rate = '1.5'
  []
  [swelling]
    type = ScalarToDiagonalSR2
    input = 'swell_size'
    output = 'swell_strain'
  []
  [dashpot_strain]
    type = SR2LinearCombination
    from = 'net_strain creep_strain swell_strain'
    weights = '1.0 -1.0 -1.0'
    to = 'held_strain'
  []
  [dashpot_stress]
    type = LinearIsotropicElasticity
    strain = 'held_strain'
    stress = 'dashpot_stress'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
    coefficients = '90.0 0.31'
  []
  [dashpot]
    type = LinearDashpot
    stress = 'dashpot_stress'
    viscous_strain_rate = 'creep_strain_rate'
    viscosity = '250.0'
  []
  [dilation]
    type = SR2Invariant
    tensor = 'held_strain'
    invariant = 'dilation'
    invariant_type = 'I1'
  []
  [ageing]
    type = ScalarLinearCombination
    from = 'heat_drive age dilation'
    weights = '1.0 -0.6 40.0'
    to = 'age_rate'
  []
  [creep_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'creep_strain'
  []
  [age_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'age'
  []
  [residual]
    type = ComposedModel
    models = 'swell swelling dashpot_strain dashpot_stress dashpot dilation ageing creep_step age_step'
  []
  [last_known]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'creep_strain'
    unknowns_Scalar = 'age'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'last_known'
  []

  # after
  [left]
    type = SR2LinearCombination
    from = 'net_strain creep_strain'
    weights = '1.0 -1.0'
    to = 'left_strain'
  []
  [left_stress]
    type = LinearIsotropicElasticity
    strain = 'left_strain'
    stress = 'stress'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
    coefficients = '120.0 0.28'
  []

  [bar]
    type = ComposedModel
    models = 'expansion net squeeze heat update left left_stress'
    additional_outputs = 'creep_strain age'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'creep_strain age'
  []
[]

[Solvers]
  [lu]
    type = DenseLU
  []
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-14
    rel_tol = 1e-13
    max_its = 30
    max_linesearch_iterations = 4
  []
[]

# The driver speaks to neml2 3.0.6 and later; before, its word was force_ for prescribed_. A compile does not mind.
[Drivers]
  [heating]
    type = TransientDriver
    model = 'bar'
    prescribed_time = 'hours'
    prescribed_Scalar_names = 'temperature'
    prescribed_Scalar_values = 'bar_temperatures'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'bar_strains'
  []
[]
