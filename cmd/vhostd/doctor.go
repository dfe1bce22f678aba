package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// verdict is what a finding means for vhostd.
type verdict string

const (
	verdictOK   verdict = "ok"
	verdictWarn verdict = "warn" // vhostd runs, and something that some users want does not
	verdictFail verdict = "fail" // vhostd cannot serve a guest
)

// finding is one thing that doctor looked at.
type finding struct {
	What    string  `json:"what"`
	Verdict verdict `json:"verdict"`
	Detail  string  `json:"detail"`            // what was found
	Meaning string  `json:"meaning,omitempty"` // what follows from it
	Fix     string  `json:"fix,omitempty"`     // what changes it; "" when there is nothing to change
}

// checkup is the whole.
type checkup struct {
	OK       bool      `json:"ok"` // nothing failed
	Findings []finding `json:"findings"`
}

func newDoctor() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this host can do for vhostd, and what to change",
		Long: `Look at this host with the eyes of vhostd: each line says what was found, what follows from it and which command changes it.
Nothing is changed. Run it as the user who is to run vhostd. The exit code is 1 if a guest cannot be served at all.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := examine()
			var err error
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), c)
			} else {
				err = c.print(cmd.OutOrStdout())
			}
			if err == nil && !c.OK {
				err = errors.New("this host cannot serve a guest: see the lines that say fail")
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// checks are made in this order: what every guest needs, what devices need, what makes it fast.
var checks = []func() []finding{
	checkKernel, checkMemfd, checkFiles, checkQEMU, checkKVM,
	checkPing, checkTap, checkPacket,
	checkConfinement, checkLockedMemory, checkHugePages, checkIOURing, checkZeroCopySend, checkXDP,
}

func examine() checkup {
	c := checkup{OK: true}
	for _, check := range checks {
		c.Findings = append(c.Findings, check()...)
	}
	for _, f := range c.Findings {
		c.OK = c.OK && f.Verdict != verdictFail
	}
	return c
}

func (c checkup) print(w io.Writer) error {
	for _, f := range c.Findings {
		if _, err := fmt.Fprintf(w, "%-4s  %s: %s\n", f.Verdict, f.What, f.Detail); err != nil {
			return err
		}
		if f.Meaning != "" {
			fmt.Fprintf(w, "      %s\n", f.Meaning)
		}
		if f.Fix != "" {
			fmt.Fprintf(w, "      to change it: %s\n", f.Fix)
		}
	}
	return nil
}

// one makes a finding of an error: fine if there is none, else bad.
func one(f finding, err error, bad verdict) []finding {
	if err == nil {
		f.Verdict, f.Fix = verdictOK, ""
		return []finding{f}
	}
	f.Verdict, f.Detail = bad, err.Error()
	return []finding{f}
}
