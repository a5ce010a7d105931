# Creep with a softening variable, solved matrix-free. Stress in MPa, time in s.
#
# Unknowns: creep_strain (6) and creep_measure (1). There is no predictor, so the unknowns themselves are inputs: the
# iteration starts from what the caller passes. The file holds several Newton solvers; the entries of the catalogue
# choose one by an override on the command line.

[Tensors]
  # 20 steps in 100 s under a strain that is applied quickly and then held, at two material points.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 100.0, 21, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(1.5e-3 * torch.clamp(torch.linspace(0.0, 4.0, 21, dtype=torch.float64), max=1.0).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.4, -0.4, 0.0, 0.0, 0.0], [0.3, 0.1, -0.5, 0.6, 0.0, -0.4]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'krylov'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [elastic]
    type = SR2LinearCombination
    from = 'strain creep_strain'
    to = 'elastic_strain'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '140000 0.3'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises_stress'
  []
  [softening]
    type = LinearIsotropicHardening
    equivalent_plastic_strain = 'creep_measure'
    isotropic_hardening = 'softening_stress'
    hardening_modulus = -4000
  []
  [driving_stress]
    type = ScalarLinearCombination
    from = 'mises_stress softening_stress'
    to = 'driving_stress'
    weights = '1 -1'
  []
  [creep]
    type = PerzynaPlasticFlowRate
    yield_function = 'driving_stress'
    flow_rate = 'creep_rate'
    reference_stress = 900
    exponent = 4
  []
  [direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'stress'
    flow_direction = 'flow_direction'
  []
  [creep_strain_rate]
    type = AssociativePlasticFlow
    flow_rate = 'creep_rate'
    flow_direction = 'flow_direction'
    plastic_strain_rate = 'creep_strain_rate'
  []
  [strain_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'creep_strain'
  []
  [measure_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'creep_measure'
    rate = 'creep_rate'
  []
  [residual]
    type = ComposedModel
    models = 'elastic hooke mises softening driving_stress creep direction creep_strain_rate strain_step measure_step'
  []
  [krylov]
    type = ImplicitUpdate
    equation_system = 'creep_system'
    solver = 'newton_gmres'
    input_sensitivity_solver = 'tight_gmres'
  []
[]

[EquationSystems]
  [creep_system]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'creep_strain creep_measure'
  []
[]

[Solvers]
  [newton_gmres]
    type = Newton
    linear_solver = 'gmres'
    abs_tol = 1e-12
    rel_tol = 1e-10
    max_its = 40
  []
  [newton_preconditioned]
    type = NewtonWithLineSearch
    linear_solver = 'preconditioned_gmres'
    abs_tol = 1e-12
    rel_tol = 1e-10
    max_its = 40
    max_linesearch_iterations = 5
  []
  [gmres]
    type = GMRES
    restart = 5
    max_its = 60
    rel_tol = 1e-6
  []
  [tight_gmres]
    type = GMRES
    restart = 7
    max_its = 100
    rel_tol = 1e-12
  []
  [preconditioned_gmres]
    type = GMRES
    restart = 10
    max_its = 60
    rel_tol = 1e-8
    preconditioner = 'blocks'
    cache_strategy = 'chord'
  []
  [blocks]
    type = BlockJacobiPreconditioner
  []
  [lu]
    type = DenseLU
  []
[]
