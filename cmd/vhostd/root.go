package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newRoot makes the tree of commands.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "vhostd",
		Short: "The host side of a virtual machine's network card",
		Long: `vhostd is a vhost-user network back-end: QEMU, libvirt, cloud-hypervisor and other VMMs hand it a virtual
machine's queues over a UNIX socket, and it carries the frames, from the guest's own memory, to a network of the
host or to one of its own that needs no privilege.

  vhostd run --socket-path /tmp/vm1.sock         serve one virtual machine
  vhostd serve --config /etc/vhostd/vhostd.toml  serve many, as a file says
  vhostd stats --socket-path /tmp/vm1.sock       what it is doing
  vhostd bench --socket-path /tmp/vm1.sock       how fast a back-end is, without a virtual machine
  vhostd doctor                                  what this host can do, and what to change`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.Version = buildInfo().Version
	root.AddCommand(newRun(), newServe(), newCheck(), newReload(), newStats(), newBench(), newDoctor(), newVersion(), newMan(root))
	return root
}

// noArgs refuses whatever is not an option, and on the root what is no command.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasParent():
		return usagef("%s takes options only, not %q", cmd.CommandPath(), args[0])
	}
	return usagef("unknown command %q", args[0])
}

func newMan(root *cobra.Command) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "man --dir DIR",
		Short: "Write the manual pages to a directory",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			if dir == "" {
				return usagef("--dir is needed: where to write the manual pages")
			}
			root.DisableAutoGenTag = true // the same input makes the same pages
			head := doc.GenManHeader{Title: "VHOSTD", Section: "1", Source: "vhostd " + buildInfo().Version, Manual: "vhostd"}
			if err := doc.GenManTree(root, &head, dir); err != nil {
				return fmt.Errorf("manual pages: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`directory` to write to; it must exist")
	return cmd
}
