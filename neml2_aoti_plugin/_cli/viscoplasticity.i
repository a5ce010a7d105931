# J2 viscoplasticity of Perzyna's kind with linear isotropic hardening, driven by the total strain.
# Stress in MPa, time in s. At 1e-3 per s the overstress is 60 * (1e-3)^(1/4) = 11 MPa or so.
#
# Unknowns: stress (6) and equivalent_plastic_strain (1). AssociativeJ2FlowDirection points along 3/2 s / vm,
# so the flow rate is itself the rate of equivalent plastic strain.

[Tensors]
  # 60 steps to 3 % strain in 30 s, at three material points: near uniaxial, shear, and a mixture.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 30.0, 61, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 3.0e-2, 61, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.49, -0.49, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.2], [0.6, -0.4, -0.15, 0.3, 0.0, 0.5]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'viscoplasticity'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [total_rate]
    type = SR2VariableRate
    variable = 'strain'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises_stress'
  []
  [hardening]
    type = LinearIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'hardening_stress'
    hardening_modulus = 1800
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 180
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 60
    exponent = 4
  []
  [direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'stress'
    flow_direction = 'flow_direction'
  []
  [plastic_rate]
    type = AssociativePlasticFlow
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    plastic_strain_rate = 'plastic_strain_rate'
  []
  [elastic_rate]
    type = SR2LinearCombination
    from = 'strain_rate plastic_strain_rate'
    to = 'elastic_strain_rate'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    rate_form = true
    coefficients = '190000 0.3'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [stress_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'stress'
  []
  [plastic_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'flow_rate'
  []
  [residual]
    type = ComposedModel
    models = 'total_rate mises hardening overstress viscosity direction plastic_rate elastic_rate hooke stress_step plastic_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'stress'
    unknowns_Scalar = 'equivalent_plastic_strain'
  []
  [viscoplasticity]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'stress equivalent_plastic_strain'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-8
    rel_tol = 1e-10
    max_its = 50
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
  # For the entry bicgstab, which chooses it by an override. neml2's BiCGStab takes inner products below 2e-16 for
  # zero: it needs a residual in MPa (as here) rather than in strain, and an absolute tolerance.
  [newton_bicgstab]
    type = Newton
    linear_solver = 'bicgstab'
    abs_tol = 1e-6
    rel_tol = 1e-8
    max_its = 50
  []
  [bicgstab]
    type = BiCGStab
    max_its = 60
    abs_tol = 1e-7
    rel_tol = 1e-5
    preconditioner = 'diagonal'
    cache_strategy = 'max_its'
    cache_max_its = 5
  []
  [diagonal]
    type = JacobiPreconditioner
  []
[]
