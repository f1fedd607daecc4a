/*
 * vmbed: the virtual machine monitor that you embed.
 *
 * A program that links libvmbed runs KVM virtual machines inside its own process: no daemon, no global state, no
 * opinion about the process. Build with `cc program.c $(pkg-config --cflags --libs vmbed)`.
 *
 *     #include <stdio.h>
 *     #include <vmbed.h>
 *
 *     int main(void)
 *     {
 *         vmbed_error *error = NULL;
 *         vmbed_host *host = NULL;
 *         vmbed_config *config = NULL;
 *         vmbed_builder *builder = NULL;
 *         vmbed_vm *vm = NULL;
 *         int32_t cause;
 *
 *         if (vmbed_host_open(NULL, &host, &error) ||
 *             vmbed_config_new_linux("vmlinuz", &config, &error) ||
 *             vmbed_config_set_cmdline(config, "console=ttyS0", &error) ||
 *             vmbed_builder_new(host, config, &builder, &error) ||
 *             vmbed_builder_console_output(builder, 1, &error) ||
 *             vmbed_builder_build(builder, &vm, &error) ||
 *             vmbed_vm_start(vm, &error) ||
 *             vmbed_vm_wait(vm, -1, &cause, &error))
 *             fprintf(stderr, "%s\n", vmbed_error_message(error));
 *         else
 *             printf("the guest has ended: cause %d\n", cause);
 *         int status = error != NULL;
 *         vmbed_vm_free(vm);
 *         vmbed_builder_free(builder);
 *         vmbed_config_free(config);
 *         vmbed_host_free(host);
 *         vmbed_error_free(error);
 *         return status;
 *     }
 *
 * Statuses. A function that can fail returns VMBED_OK (0) or one of VMBED_ERR_* (negative), and takes a
 * `vmbed_error **error` last. That may be NULL; else it is set to NULL, or to an error that is yours to free.
 *
 * Handles. Each opaque type has its own _free; NULL is a no-op there, and the order does not matter. Results are given
 * through a pointer that is not NULL and is set only where the call works. A call on a handle that was freed answers
 * VMBED_ERR_INVALID_ARGUMENT as long as no new handle of that type has taken its place.
 *
 * Pointers. A pointer may be NULL only where its comment says so; elsewhere NULL is answered with
 * VMBED_ERR_INVALID_ARGUMENT. Text is UTF-8 and ends with a NUL; paths are bytes. What goes in is copied before the call
 * returns. Text that comes out lives as long as the handle that it belongs to.
 *
 * Structures begin with their own size. Set it, zero the rest, fill in what you need: a newer library finds your older
 * structure shorter, an older one accepts your newer structure as long as what it does not know is zero.
 *
 * Callbacks are a function, its data and a destroy function. The destroy function may be NULL; else it is called exactly
 * once, when the data are needed no more, also where the call that they were given to fails.
 *
 * Threads. Every function may be called from any thread at any time, on the same handle too. Unless its comment says
 * otherwise it does not block. The library blocks all signals on its own threads, and installs no handlers.
 *
 * Forks. A child of a fork has no part in its parent's VMs: there every call on a handle of the parent's answers
 * VMBED_ERR_INVALID_STATE, and every _free of one does nothing. It may open a host and run VMs of its own.
 *
 * fds are duplicated: yours stay yours.
 */
