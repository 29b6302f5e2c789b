"""What a comparison asks: one file a task, all behind one interface (`longmem.tasks.task`)."""
