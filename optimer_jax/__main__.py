from optimer_jax.cli import main

main()
