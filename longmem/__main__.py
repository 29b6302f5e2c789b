from longmem.cli import main

main()
