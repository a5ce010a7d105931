# Three dashpots, each in series with a spring, act in parallel under a given stress: the branches share one strain.
# Stress in MPa, time in s. The branches are a sub-batch of 3.
#
# Two groups of unknowns: branch_strain, the viscous strain of each branch (3 x 6, kept per branch), and strain, the
# common strain (6). The branches see each other only through the common strain, so a Schur complement fits.

[Settings]
  [example_batch_shape]
    branch_strain = '(2; 3)'
  []
[]

[Tensors]
  # 20 steps in 40 s at two material points: stress applied within 8 s, then held.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 40.0, 21, dtype=torch.float64))'
  []
  [stresses]
    type = Python
    expr = 'SR2(torch.clamp(torch.linspace(0.0, 5.0, 21, dtype=torch.float64), max=1.0).reshape(-1, 1, 1) * torch.tensor([[30.0, 0.0, 0.0, 0.0, 0.0, 0.0], [10.0, -5.0, 0.0, 0.0, 0.0, 20.0]], dtype=torch.float64))'
  []
  [moduli]
    type = Python
    expr = 'Scalar(torch.tensor([3000.0, 1500.0, 800.0], dtype=torch.float64), sub_batch_ndim=1)'
  []
  [viscosities]
    type = Python
    expr = 'Scalar(torch.tensor([60.0, 150.0, 400.0], dtype=torch.float64), sub_batch_ndim=1)'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'cross_group'
    prescribed_time = 'times'
    prescribed_SR2_names = 'stress'
    prescribed_SR2_values = 'stresses'
  []
[]

[Models]
  [stretch]
    type = SR2LinearCombination
    from = 'strain branch_strain'
    to = 'spring_strain'
    weights = '1 -1'
  []
  [springs]
    type = LinearIsotropicElasticity
    strain = 'spring_strain'
    stress = 'branch_stress'
    coefficients = 'moduli 0.35'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'branch_stress'
    invariant = 'branch_mises'
  []
  [dashpots]
    type = PerzynaPlasticFlowRate
    yield_function = 'branch_mises'
    flow_rate = 'branch_flow'
    reference_stress = 'viscosities'
    exponent = 2
  []
  [direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'branch_stress'
    flow_direction = 'branch_direction'
  []
  [flow]
    type = AssociativePlasticFlow
    flow_rate = 'branch_flow'
    flow_direction = 'branch_direction'
    plastic_strain_rate = 'branch_strain_rate'
  []
  [branch_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'branch_strain'
  []
  [total]
    type = SR2IntermediateSum
    from = 'branch_stress'
    to = 'total_stress'
    reduces = 'branch'
  []
  [equilibrium]
    type = SR2LinearCombination
    from = 'total_stress stress'
    to = 'strain_residual'
    weights = '1 -1'
  []
  [residual]
    type = ComposedModel
    models = 'stretch springs mises dashpots direction flow branch_step total equilibrium'
  []
  [cross_group]
    type = ImplicitUpdate
    equation_system = 'branches'
    solver = 'newton'
  []
[]

[EquationSystems]
  [branches]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'branch_strain; strain'
    residuals = 'branch_strain_residual; strain_residual'
    structure = 'block dense'
  []
[]

[Solvers]
  [newton]
    type = Newton
    linear_solver = 'schur'
    abs_tol = 1e-11
    rel_tol = 1e-14
    max_its = 30
  []
  [schur]
    type = SchurComplement
    residual_primary_group = 0
    unknown_primary_group = 0
    primary_solver = 'lu'
    schur_solver = 'lu'
  []
  [lu]
    type = DenseLU
  []
[]
