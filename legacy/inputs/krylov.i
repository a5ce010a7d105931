# Two strains and a scalar that pull at each other, solved without a matrix: GMRES with a block Jacobi preconditioner
# in the Newton iteration, and again where the solution is differentiated.

[Models]
  [tie]
    type = SR2LinearCombination
    from = 'p a b'
    weights = '1.0 -2.0 0.5'
    to = 'a_rate'
  []
  [follow]
    type = SR2LinearCombination
    from = 'a b'
    weights = '0.7 -1.5'
    to = 'b_rate'
  []
  [size]
    type = SR2Invariant
    tensor = 'b'
    invariant = 'size'
    invariant_type = 'I1'
  []
  [limit]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'c'
    isotropic_hardening = 'limit'
    saturated_hardening = '1.4'
    saturation_rate = '0.8'
  []
  [grow]
    type = ScalarLinearCombination
    from = 'size limit'
    weights = '1.0 -1.0'
    to = 'c_rate'
  []
  [a_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'a'
  []
  [b_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'b'
  []
  [c_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'c'
  []
  [residual]
    type = ComposedModel
    models = 'tie follow size limit grow a_step b_step c_step'
  []
  [ties]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    input_sensitivity_solver = 'tight'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'a b c'
  []
[]

[Solvers]
  [blocks]
    type = BlockJacobiPreconditioner
  []
  [gmres]
    type = GMRES
    restart = 20
    max_its = 60
    rel_tol = 1e-8
    preconditioner = 'blocks'
  []
  [tight]
    type = GMRES
    max_its = 60
    rel_tol = 1e-13
  []
  [newton]
    type = Newton
    linear_solver = 'gmres'
    abs_tol = 1e-12
    rel_tol = 1e-12
  []
[]
